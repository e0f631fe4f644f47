"""Recycled attention: the right entries are read, in the right steps, and no others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

import foveate as fv
from foveate.cache.recycled import SkippedIsNotLost
from foveate.claims import CLAIMS
from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.models.tiny import tiny

MODEL = tiny("llama").double()
IDS = torch.randint(3, 200, (2, 60), generator=torch.Generator().manual_seed(3))


class Reference:
    """The same in Python loops over sequences, layers, KV heads and entries, in float64."""

    def __init__(self, policy):
        self.policy, self.layers, self.read = policy, {}, {}

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1], dtype=torch.float64)
        for row in range(len(query)):
            state = self.layers.setdefault((module.layer_idx, row), {})
            out[row] = self.attend(module.layer_idx, state, query[row], key[row], value[row], scaling)
        return out, None

    def attend(self, layer, state, query, key, value, scaling):
        new, total, group = query.shape[1], key.shape[1], query.shape[0] // key.shape[0]
        full = new > 1 or not state
        if not full:
            state["since"] += 1
            full = state["since"] % self.policy.stride == 0
            if full and self.policy.similarity is not None:
                cosines = [
                    float(q @ p / (q.norm() * p.norm())) for q, p in zip(query[:, 0], state["query"], strict=True)
                ]
                full = sum(cosines) / len(cosines) < self.policy.similarity
            full = full or total <= self.policy.entries
        if full:
            state["since"], state["query"] = 0, query[:, -1]
        out = torch.zeros(new, query.shape[0], value.shape[-1], dtype=torch.float64)
        for h in range(key.shape[0]):
            entries = list(range(total)) if full else self.chosen(state, h, total)
            self.read[layer, h] = self.read.get((layer, h), 0) + len(entries)
            last = [0.0] * total
            for head in range(h * group, (h + 1) * group):
                for i in range(new):
                    seen = [t for t in entries if t <= total - new + i]
                    weights = (key[h, seen] @ query[head, i] * scaling).softmax(0)
                    out[i, head] = weights @ value[h, seen]
                    if i == new - 1:
                        for t, w in zip(seen, weights.tolist(), strict=True):
                            last[t] += w
            if full:
                state[h] = last
        return out

    def chosen(self, state, h, total):
        k, p = self.policy.entries, self.policy
        newest = range(total - 1, total - 1 - max(state["since"], 1, min(int(k * p.recent), k - p.sinks)), -1)
        best = sorted(range(len(state[h])), key=lambda t: -state[h][t])
        return sorted(list(dict.fromkeys([*range(p.sinks), *newest, *best]))[:k])


@torch.no_grad()
def logits_in(pieces, ids, cache=None):
    out, start = [], 0
    for size in pieces:
        step = MODEL(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        out.append(step.logits)
        cache, start = step.past_key_values, start + size
    return torch.cat(out, 1), cache


@pytest.mark.parametrize(
    "text",
    [
        "recycled:entries=9,stride=4",
        "recycled:entries=3,stride=9",
        "recycled:entries=9,stride=3,sinks=2,recent=0.4",
        "recycled:entries=9,stride=2,similarity=0.3",
        "recycled:entries=9,stride=1,similarity=0.5",
    ],
)
@settings(max_examples=4, deadline=None)
@given(prompt=st.integers(1, 25), more=st.lists(st.sampled_from([1, 1, 1, 1, 3]), min_size=8, max_size=16))
def test_same_logits_and_as_many_reads_as_the_reference(text, prompt, more):
    reference = Reference(Recipe.of(text).methods[0])
    AttentionInterface.register("reference", reference)
    before = MODEL.config._attn_implementation
    MODEL.set_attn_implementation("reference")
    try:
        expected, _ = logits_in([prompt, *more], IDS)
    finally:
        MODEL.set_attn_implementation(before)
    with apply(MODEL, text):
        ours, cache = logits_in([prompt, *more], IDS)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for index, layer in enumerate(cache.layers):
        for h, read in enumerate(layer.read.sum(0).tolist()):
            assert read == reference.read[index, h]


@pytest.mark.parametrize("more", ["", ",similarity=1"])
def test_every_step_full_is_dense(more):
    full, _ = logits_in([20] + [1] * 20, IDS)
    with apply(MODEL, f"recycled:entries=4,stride=1{more}"):
        ours, cache = logits_in([20] + [1] * 20, IDS)
    torch.testing.assert_close(ours, full)
    assert (cache.layers[0].read == sum(range(20, 41))).all()


def test_a_similarity_that_is_always_reached_never_takes_a_full_step():
    with apply(MODEL, "recycled:entries=6,stride=1,similarity=-1"):
        _, cache = logits_in([20] + [1] * 10, IDS)
    assert (cache.layers[0].read == 20 + 10 * 6).all()


@pytest.mark.parametrize("text", ["recycled:entries=6,stride=3", "recycled:entries=6,stride=2,similarity=0"])
def test_sequences_of_a_batch_decide_alone(text):
    """One in its batch is padded, and with a similarity the two take full steps at different times."""
    first = torch.ones(2, 20, dtype=torch.long)
    first[1, :7] = 0
    with apply(MODEL, text), torch.no_grad():
        out = MODEL(IDS[:, :20], attention_mask=first, use_cache=True)
        alone = [MODEL(IDS[:1, :20], use_cache=True), MODEL(IDS[1:, 7:20], use_cache=True)]
        for i in range(20, 32):
            mask = torch.cat([first, torch.ones(2, i - 19, dtype=torch.long)], 1)
            out = MODEL(IDS[:, i : i + 1], attention_mask=mask, past_key_values=out.past_key_values)
            alone = [
                MODEL(IDS[r : r + 1, i : i + 1], past_key_values=one.past_key_values) for r, one in enumerate(alone)
            ]
            torch.testing.assert_close(out.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=1e-5)
    reads = torch.stack([layer.read for layer in out.past_key_values.layers])
    for row, one in enumerate(alone):
        assert torch.equal(reads[:, row], torch.stack([layer.read[0] for layer in one.past_key_values.layers]))
    if "similarity" in text:
        assert len(set(reads[:, 0, 0].tolist())) > 2


def test_a_budget_over_layers_is_what_they_read():
    with apply(MODEL, "recycled:entries=8,budget=pyramid(slope=3)"):
        _, cache = logits_in([40], IDS)
        before = [layer.read for layer in cache.layers]
        _, cache = logits_in([1], IDS, cache)
    assert [int((b.read - a)[0, 0]) for a, b in zip(before, cache.layers, strict=True)] == [12, 9, 6, 4]
    assert all((layer.held() == 41).all() for layer in cache.layers)


def test_cropping_goes_on_as_if_never_read():
    with apply(MODEL, "recycled:entries=6,stride=1"):
        _, cache = logits_in([20, 1, 1], IDS)
        cache.crop(-2)
        again, _ = logits_in([1, 1], IDS[:, 20:], cache)
        whole, _ = logits_in([20, 1, 1], IDS)
    torch.testing.assert_close(again, whole[:, 20:])


@pytest.mark.parametrize("field,says", [("stride=0", "below 1"), ("similarity=2", "cosine")])
def test_bad_fields_get_a_sentence(field, says):
    with pytest.raises(FoveateError, match=says):
        Recipe.of(f"recycled:entries=8,{field}")


def test_the_claim_is_tried(monkeypatch):
    monkeypatch.setattr(SkippedIsNotLost, "prompt", 160)
    monkeypatch.setattr(SkippedIsNotLost, "steps", 12)
    monkeypatch.setattr(SkippedIsNotLost, "size", 16)
    bench = fv.Bench(tiny("llama"), fv.tiny_tokenizer(), fv.load_text("prose"))
    finding = CLAIMS["recycled"]().run(bench)
    assert finding.checks["every step full is the full cache"]
    read = finding.metrics["keys read, of all: recycled"].value
    assert read == pytest.approx((11 * 16 + 170) / sum(range(161, 173)))
