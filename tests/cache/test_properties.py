"""Random sequences of prompts, chunks, steps, reordered batches and cropped texts, against the plain reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, DynamicCache

from foveate.methods import Recipe, apply
from foveate.models.anatomy import anatomy
from foveate.models.tiny import tiny

MODEL = tiny("llama").double()
KV_HEADS = anatomy(MODEL).kv_heads

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 12)),
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("crop"), st.integers(1, 5)),
        st.tuples(st.just("reorder"), st.permutations(range(2))),
        st.tuples(st.just("copy"), st.sampled_from([[0, 0], [1, 1]])),
    ),
    min_size=3,
    max_size=9,
)


class Reference:
    """Keeps every key of every sequence; what is live, and what it has received, in Python loops."""

    def __init__(self, policy):
        self.policy = policy
        self.rows = [{}, {}]  # of each sequence, by (layer, kv_head): live tokens, and what each received
        self.inv_freq = anatomy(MODEL).inv_freq(0).double()

    def turned(self, x, shift):
        half = x.shape[-1] // 2
        turn = torch.polar(torch.ones(len(shift), half).double(), shift[:, None].double() * self.inv_freq)
        z = torch.complex(x[:, :half], x[:, half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        batch, heads, new, _ = query.shape
        total, group = key.shape[2], heads // KV_HEADS
        out = torch.zeros(batch, new, heads, value.shape[-1], dtype=torch.float64)
        for b in range(batch):
            for h in range(KV_HEADS):
                live, got = self.rows[b].get((module.layer_idx, h), ([], {}))
                live = live + list(range(total - new, total))
                got = got | {t: 0.0 for t in range(total - new, total)}
                at = torch.tensor(live)
                place = torch.arange(len(live)) if self.policy.name == "streaming" else at
                keys = self.turned(key[b, h, live], place - at)
                for head in range(h * group, (h + 1) * group):
                    for i in range(new):
                        n = live.index(total - new + i) + 1
                        q = self.turned(query[b, head, i : i + 1], place[n - 1 : n] - at[n - 1 : n])[0]
                        weights = (keys[:n] @ q * scaling).softmax(0)
                        out[b, i, head] = weights @ value[b, h, live[:n]]
                        for t, w in zip(live, weights.tolist(), strict=False):
                            got[t] += w
                self.rows[b][module.layer_idx, h] = (self.kept(live, got, total), got)
        return out, None

    def kept(self, live, got, total):
        p = self.policy
        recent = max(1, int(p.entries * p.recent))
        while len(live) > p.entries:
            may_go = [t for t in live if t >= p.sinks and t < total - recent]
            gone = min(may_go, key=lambda t: got[t] if p.name == "h2o" else t)
            live = [t for t in live if t != gone]
        return live

    def crop(self, length):
        for row in self.rows:
            for at, (live, got) in row.items():
                row[at] = ([t for t in live if t < length], {t: g for t, g in got.items() if t < length})

    def reorder(self, order):
        self.rows = [dict(self.rows[i]) for i in order]


def run(operations, cache, after):
    """Logits of every forward; `after` is told of every other operation."""
    logits, generator = [], torch.Generator().manual_seed(5)
    for kind, what in operations:
        if kind in ("read", "step"):
            for size in [what] if kind == "read" else [1] * what:
                ids = torch.randint(3, 200, (2, size), generator=generator)
                with torch.no_grad():
                    out = MODEL(ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits)
                after("read", None, cache)
        elif cache is not None and kind == "crop" and cache.get_seq_length() > what + 1:
            length = cache.get_seq_length() - what
            cache.crop(-what)
            after("crop", length, cache)
        elif cache is not None and kind in ("reorder", "copy"):
            cache.reorder_cache(torch.tensor(what))
            after("reorder", what, cache)
    return logits, cache


@pytest.mark.parametrize(
    "text", ["window:entries=9", "streaming:entries=9", "h2o:entries=10,sinks=2,recent=0.3", "h2o:entries=7,recent=0"]
)
@settings(max_examples=12, deadline=None)
@given(operations=OPERATIONS)
def test_any_sequence_of_operations_is_that_of_the_reference(text, operations):
    policy = Recipe.of(text).methods[0]
    operations = [("read", 5), *operations]
    reference = Reference(policy)

    def told(kind, what, cache):
        if kind == "crop":
            reference.crop(what)
        elif kind == "reorder":
            reference.reorder(what)

    AttentionInterface.register("reference", reference)
    before = MODEL.config._attn_implementation
    MODEL.set_attn_implementation("reference")
    try:
        expected, _ = run(operations, DynamicCache(config=MODEL.config), told)
    finally:
        MODEL.set_attn_implementation(before)

    def holds(kind, what, cache):
        seen = cache.get_seq_length()
        for layer in cache.layers:
            assert int(layer.held().max()) <= policy.entries
            for head in layer.positions.flatten(0, 1).tolist():
                live = [p for p in head if p >= 0]
                assert live == sorted(set(live)) and all(p < seen for p in live)
                if kind == "read":  # a crop may have taken what made others go
                    assert live[-1] == seen - 1
                assert live[: policy.sinks] == list(range(min(policy.sinks, len(live))))

    with apply(MODEL, text):
        ours, cache = run(operations, None, holds)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for index, layer in enumerate(cache.layers):
        for b in range(2):
            for h in range(KV_HEADS):
                live = [p for p in layer.positions[b, h].tolist() if p >= 0]
                assert live == reference.rows[b][index, h][0]


@torch.no_grad()
def test_memory_stays_flat_over_a_long_stream():
    """What docs/cache.md tells of 100,000 tokens, in small."""
    from foveate.models.caches import cache_bytes

    model = tiny("llama")
    for recipe in (
        "streaming:entries=32",
        "h2o:entries=32,budget=pyramid",
        "window:entries=32,budget=gates(whole=0.1)",
    ):
        sizes = []
        with apply(model, recipe, tokenizer=_tokenizer()):
            cache = model(torch.randint(3, 100, (1, 64)), use_cache=True).past_key_values
            for _ in range(150):
                cache = model(torch.randint(3, 100, (1, 1)), past_key_values=cache, use_cache=True).past_key_values
                sizes.append(cache_bytes(cache))
        assert max(sizes) == min(sizes[2:]), recipe


def _tokenizer():
    from foveate.models.tiny import tiny_tokenizer

    return tiny_tokenizer()
