"""The cache policies against a slow, plain reference in float64 that evicts nothing but masks what would be gone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from foveate.methods import Recipe, apply
from foveate.models.anatomy import anatomy
from foveate.models.tiny import tiny

MODEL = tiny("llama").double()
IDS = torch.randint(3, 200, (1, 80), generator=torch.Generator().manual_seed(3))


class Reference:
    """Keeps every key; per layer and KV head a list of live tokens and what each has received, in Python loops."""

    def __init__(self, policy, budget):
        self.policy, self.budget, self.layers = policy, budget, {}
        self.inv_freq = anatomy(MODEL).inv_freq(0).double()

    def turned(self, x, positions):
        """Rotate the vectors (n, dim) by `positions` steps, as complex numbers."""
        half = x.shape[-1] // 2
        turn = torch.polar(torch.ones(len(positions), half).double(), positions[:, None].double() * self.inv_freq)
        z = torch.complex(x[:, :half], x[:, half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        heads, new, total = query.shape[1], query.shape[2], key.shape[2]
        kv_heads, seen = key.shape[1], key.shape[2] - query.shape[2]
        state = self.layers.setdefault(module.layer_idx, [{"live": [], "got": {}} for _ in range(kv_heads)])
        out = torch.zeros(1, new, heads, value.shape[-1], dtype=torch.float64)
        for h in range(kv_heads):
            live = state[h]["live"] + list(range(seen, total))
            fade = self.counts(age=0, new=new)[1]
            got = {t: w * fade for t, w in state[h]["got"].items()} | {t: 0.0 for t in range(seen, total)}
            tokens, keys = torch.tensor(live), key[0, h, live]
            place = torch.arange(len(live)) if self.policy.name == "streaming" else tokens
            keys = self.turned(keys, place - tokens)
            for g in range(heads // kv_heads):
                head = h * (heads // kv_heads) + g
                for i in range(new):
                    at = live.index(seen + i)
                    q = self.turned(query[0, head, i : i + 1], place[at : at + 1] - (seen + i))
                    weights = (keys[: at + 1] @ q[0] * scaling).softmax(0)
                    out[0, i, head] = weights @ value[0, h, live[: at + 1]]
                    for t, w in zip(live, weights.tolist(), strict=False):
                        got[t] += w * self.counts(age=new - 1 - i, new=new)[0]
            state[h] = {"live": live, "got": got}
        everything = [dict(head) for head in state]
        for head in state:
            head["live"] = self.kept(head["live"], self.scores(head, everything, total), total)
        return out, None

    def counts(self, age, new):
        """What the attention of a query counts, and what was received before a forward of `new` tokens."""
        if self.policy.name == "a2sf":
            return self.policy.forget**age, self.policy.forget**new
        last = {"snapkv": getattr(self.policy, "window", None), "tova": 1}.get(self.policy.name)
        return (1, 1) if last is None else (float(age < last), max(0, 1 - new / last))

    def scores(self, head, everything, total):
        p, live, got = self.policy, head["live"], head["got"]
        if p.name in ("h2o", "a2sf"):
            return got
        if p.name == "tova":
            return {t: sum(other["got"][t] for other in everything) for t in live}
        if p.name == "snapkv":
            own = [got[t] if t < total - p.window else 0.0 for t in live]
            scores = {}
            for at, t in enumerate(live):
                near = own[max(0, at - p.kernel // 2) : at + p.kernel // 2 + 1]
                pooled = max(near) if p.pooling == "max" else sum(near) / p.kernel
                scores[t] = (pooled, own[at]) if t < total - p.window else (float("inf"), t)
            return scores
        return {t: t for t in live}

    def kept(self, live, scores, total):
        live, p = list(live), self.policy
        recent = max(1, int(self.budget * p.recent))
        while len(live) > self.budget:
            may_go = [t for t in live if t >= p.sinks and t < total - recent]
            live.remove(min(may_go, key=scores.__getitem__))
        return live


def logits_in(pieces, cache=None):
    out, start = [], 0
    with torch.no_grad():
        for size in pieces:
            step = MODEL(IDS[:, start : start + size], past_key_values=cache, use_cache=True)
            out.append(step.logits)
            cache, start = step.past_key_values, start + size
    return torch.cat(out, 1), cache


@pytest.mark.parametrize(
    "text",
    [
        "window:entries=9",
        "streaming:entries=9",
        "h2o:entries=9",
        "h2o:entries=10,sinks=2,recent=0.3",
        "a2sf:entries=9",
        "a2sf:entries=9,forget=0.8,recent=0.3",
        "snapkv:entries=9,window=3,kernel=3",
        "snapkv:entries=10,window=4,kernel=5,pooling=mean,sinks=1",
        "snapkv:entries=5,window=7",
        "tova:entries=9",
        "tova:entries=10,sinks=2,recent=0.3",
    ],
)
@settings(max_examples=6, deadline=None)
@given(pieces=st.lists(st.integers(1, 9), min_size=2, max_size=7))
def test_same_logits_and_same_entries_as_the_reference(text, pieces):
    policy = Recipe.of(text).methods[0]
    reference = Reference(policy, policy.entries)
    AttentionInterface.register("reference", reference)
    before = MODEL.config._attn_implementation
    MODEL.set_attn_implementation("reference")
    try:
        expected, _ = logits_in(pieces)
    finally:
        MODEL.set_attn_implementation(before)
    with apply(MODEL, text):
        ours, cache = logits_in(pieces)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for index, layer in enumerate(cache.layers):
        for h, state in enumerate(reference.layers[index]):
            assert layer.positions[0, h].tolist() == state["live"]


def test_random_keeps_a_uniform_sample():
    with apply(MODEL, "random:entries=20"):
        _, cache = logits_in([1] * 80)
    kept = torch.cat([layer.positions.flatten() for layer in cache.layers]).float()
    assert 30 < kept[kept < 79].mean() < 48  # of 0 ... 78; the last token is always there
    assert len({tuple(p.tolist()) for layer in cache.layers for p in layer.positions[0]}) > 1


def test_a_stated_context_is_what_keep_is_a_fraction_of():
    with apply(MODEL, "window:keep=0.5", context=16):
        _, cache = logits_in([5, 30, 1])
    assert int(cache.layers[0].held().max()) == 8
    with apply(MODEL, "window:keep=1", context=16):
        _, cache = logits_in([5, 30, 1])
    assert int(cache.layers[0].held().max()) == 16


def test_the_prompt_is_what_came_in_forwards_of_more_than_one_token():
    with apply(MODEL, "window:keep=0.5"):
        _, cache = logits_in([20, 10] + [1] * 10)
    assert int(cache.layers[0].held().max()) == 15


def test_reset_crop_reorder_and_repeat():
    with apply(MODEL, "h2o:entries=8"):
        _, cache = logits_in([20, 1, 1])
        cache.crop(-4)
        assert cache.get_seq_length() == 18
        assert int(max(layer.positions.max() for layer in cache.layers)) < 18
        with torch.no_grad():
            MODEL(IDS[:, 18:22], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 22
        one = cache.layers[1].positions.clone()
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([2, 0]))
        cache.batch_select_indices(torch.tensor([1]))
        assert torch.equal(cache.layers[1].positions, one)
        cache.reset()
        again, cache = logits_in([20, 1, 1], cache)
        assert cache.get_seq_length() == 22
        fresh, _ = logits_in([20, 1, 1])
    torch.testing.assert_close(again, fresh)


def test_cropping_what_was_never_evicted_leaves_no_trace():
    with apply(MODEL, "h2o:keep=1"):
        _, cache = logits_in([20])
        cache.crop(-5)
        with torch.no_grad():
            again = MODEL(IDS[:, 15:20], past_key_values=cache, use_cache=True).logits
        whole, _ = logits_in([20])
    torch.testing.assert_close(again, whole[:, 15:])


@pytest.mark.parametrize("budget", ["uniform", "pyramid", "density"])
def test_a_budget_follows_a_prompt_that_is_cropped(budget):
    with apply(MODEL, f"window:keep=0.5,budget={budget}"):
        _, cache = logits_in([40])
        cache.crop(-20)
        with torch.no_grad():
            for at in range(20, 38):
                MODEL(IDS[:, at : at + 1], past_key_values=cache, use_cache=True)
    held = torch.stack([layer.held() for layer in cache.layers])
    assert int(held.sum()) <= 10 * held.numel()
