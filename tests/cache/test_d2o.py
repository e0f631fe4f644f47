"""D2O: merging against a plain reference with loops, what may take part, and what the parts are worth alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.cache.budgets.density import Density
from foveate.cache.d2o import D2O, nearest
from foveate.cache.entries import CacheView
from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.models.tiny import tiny

MODEL = tiny("llama").double()
IDS = torch.randint(3, 120, (1, 60), generator=torch.Generator().manual_seed(3))


def view(keys, values, positions, state):
    none = torch.zeros(0)
    return CacheView(0, keys, values, positions, None, none, none, none, None, state)


def looped(policy, kept, gone):
    """One head at a time, one entry at a time, in float64; thresholds are kept as a nested list of floats or None."""
    keys, values = kept.keys.double().clone(), kept.values.double().clone()
    before = kept.state.setdefault("loops", [[None] * keys.shape[1] for _ in range(len(keys))])
    for b in range(len(keys)):
        for h in range(keys.shape[1]):
            may = [c for c, p in enumerate(kept.positions[b, h].tolist()) if p >= policy.sinks]
            found = []
            for i, position in enumerate(gone.positions[b, h].tolist()):
                if position < policy.sinks or not may:
                    continue
                cosines = []
                for c in may:
                    k, other = gone.keys[b, h, i].double(), kept.keys[b, h, c].double()
                    cosines.append(float(k @ other / (k.norm() * other.norm())))
                found.append((max(cosines), may[cosines.index(max(cosines))], i))
            if not found:
                continue
            mean = sum(u for u, _, _ in found) / len(found)
            old = before[b][h]
            before[b][h] = mean if old is None else policy.ema * mean + (1 - policy.ema) * old
            merged = [f for f in found if f[0] >= before[b][h] - 1e-5]
            for c in {c for _, c, _ in merged}:
                mine = [(math.exp(u), i) for u, at, i in merged if at == c]
                total = math.e + sum(w for w, _ in mine)
                for new, source in ((keys, gone.keys), (values, gone.values)):
                    rest = sum(w * source[b, h, i].double() for w, i in mine)
                    new[b, h, c] = (math.e * new[b, h, c] + rest) / total
    return keys, values


class Loops(D2O):
    """For tests, and not registered: D2O, merged by loops."""

    def merge(self, kept, gone):
        return looped(self, kept, gone)


def entries(generator, batch, heads, count, dim=6):
    """Keys, values and positions of `count` entries; some in front are empty."""
    keys, values = torch.randn(2, batch, heads, count, dim, generator=generator, dtype=torch.float64).unbind()
    positions = torch.arange(count, dtype=torch.int32).expand(batch, heads, count).clone()
    empty = torch.randint(0, 3, (batch, heads, 1), generator=generator)
    return keys, values, positions.masked_fill(torch.arange(count) < empty, -1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sinks=st.integers(0, 3),
    ema=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    steps=st.lists(st.integers(1, 9), min_size=2, max_size=6),
)
def test_merging_is_that_of_the_loops(seed, sinks, ema, steps):
    generator = torch.Generator().manual_seed(seed)
    policy, ours, theirs = D2O(entries=9, sinks=sinks, ema=ema), {}, {}
    for count in steps:
        keys, values, positions = entries(generator, 2, 3, 4 + count)
        stays = torch.rand(positions.shape, generator=generator) < 0.5
        stays[..., -1] = True  # as the most recent entry always does
        stays |= (positions >= 0) & (positions < sinks)
        index = stays.int().topk(3, dim=-1).indices.sort(-1).values  # of those that stay, three are held; or fewer
        held = positions.gather(-1, index).masked_fill(~stays.gather(-1, index), -1)
        wide = index[..., None].expand(-1, -1, -1, keys.shape[-1])
        gone = positions.masked_fill(stays, -1)
        pair = []
        for state in (ours, theirs):
            before = view(keys.gather(2, wide), values.gather(2, wide), held, state)
            pair.append((before, view(keys, values, gone, state)))
        expected = looped(policy, *pair[1])
        got = policy.merge(*pair[0])
        if got is None:
            assert not (gone >= sinks).any()
            got = pair[0][0].keys, pair[0][0].values
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1])
        untouched = (got[0] == pair[0][0].keys).all(-1)
        assert untouched[held < sinks].all()


def read(recipe, pieces, model=MODEL, ids=IDS, mask=None):
    cache, logits, start = None, [], 0
    with apply(model, recipe), torch.no_grad():
        for size in pieces:
            end = start + size
            out = model(
                ids[:, start:end],
                past_key_values=cache,
                use_cache=True,
                attention_mask=None if mask is None else mask[:, :end],
            )
            cache, start = out.past_key_values, end
            logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("pieces", [[40, 1, 1, 1, 5, 1], [12] * 5, [25, 13] + [1] * 8])
@pytest.mark.parametrize("fields", [{"entries": 9}, {"keep": 0.3, "sinks": 0, "recent": 0.3, "ema": 0.2}])
def test_in_a_model_it_is_that_of_the_loops(pieces, fields):
    ours, cache = read(D2O(**fields), pieces)
    expected, reference = read(Loops(**fields), pieces)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    dropped, _ = read(D2O(**fields, merging=False), pieces)
    assert (ours - dropped).abs().max() > 1e-4  # something was merged
    for mine, theirs in zip(cache.layers, reference.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)


def attend(query, keys, values):
    return (keys @ query).softmax(0) @ values


def test_an_entry_like_a_kept_one_is_merged_and_hurts_less_than_dropped():
    generator = torch.Generator().manual_seed(0)
    keys, values, positions = entries(generator, 1, 1, 6)
    positions[:] = torch.arange(6)
    keys[0, 0, 1] = keys[0, 0, 4]  # 1 goes; 4, just like it, stays; 2 goes too, and is like none
    keys[0, 0, 2] = -keys[0, 0, [3, 4, 5]].mean(0)
    held = torch.tensor([[[0, 3, 4, 5]]])
    kept = view(keys[:, :, held[0, 0]], values[:, :, held[0, 0]], held.int(), {})
    gone = view(keys, values, positions.masked_fill(torch.tensor([1, 0, 0, 1, 1, 1]).bool(), -1), kept.state)
    new_keys, new_values = D2O(entries=4, sinks=1).merge(kept, gone)
    torch.testing.assert_close(new_keys, kept.keys)  # merged keys were the same, and the other went
    torch.testing.assert_close(new_values[0, 0, 2], values[0, 0, [1, 4]].mean(0))
    assert torch.equal(new_values[0, 0, [0, 1, 3]], kept.values[0, 0, [0, 1, 3]])
    for query in torch.randn(20, 6, generator=generator, dtype=torch.float64) + 2 * keys[0, 0, 4]:
        full = attend(query, keys[0, 0], values[0, 0])
        dropped = attend(query, kept.keys[0, 0], kept.values[0, 0])
        merged = attend(query, new_keys[0, 0], new_values[0, 0])
        assert (merged - full).norm() < (dropped - full).norm()


def test_nothing_is_merged_into_sinks_and_empty_slots():
    keys = torch.eye(4, dtype=torch.float64)[None, None]
    positions = torch.tensor([[[-1, 0, 5, 6]]], dtype=torch.int32)
    went = view(keys[:, :, [0, 1, 3]], keys[:, :, [0, 1, 3]], torch.tensor([[[2, 3, 4]]], dtype=torch.int32), {})
    new, _ = D2O(entries=3, sinks=1, ema=1.0).merge(view(keys, keys, positions, went.state), went)
    assert torch.equal(new[:, :, :3], keys[:, :, :3])  # the first two are like these, but they don't take part
    only_sinks = view(keys, keys, torch.tensor([[[-1, 0, 1, 2]]], dtype=torch.int32), {})
    new, _ = D2O(entries=4, sinks=3).merge(only_sinks, went)
    assert torch.equal(new, keys)


def test_a_threshold_waits_where_nothing_goes():
    policy, state = D2O(entries=4), {}
    u = torch.tensor([[[0.2, 0.4], [0.0, 0.0]]])
    policy.threshold(state, u, u > 0)
    assert state["threshold"][0, 0] == pytest.approx(0.3) and bool(state["threshold"][0, 1].isnan())
    u = torch.tensor([[[0.0, 0.0], [0.0, 0.9]]])
    policy.threshold(state, u, u > 0)
    assert state["threshold"][0].tolist() == pytest.approx([0.3, 0.9])
    u = torch.tensor([[[0.5, 0.0], [0.0, 0.4]]])
    policy.threshold(state, u, u > 0)
    assert state["threshold"][0].tolist() == pytest.approx([0.7 * 0.5 + 0.3 * 0.3, 0.7 * 0.4 + 0.3 * 0.9])


def test_a_padded_batch_is_merged_as_each_alone():
    lengths, model = [48, 31, 40], tiny("qwen2").double()
    rows, masks = [], []
    for row, length in enumerate(lengths):
        text = torch.randint(3, 120, (1, length), generator=torch.Generator().manual_seed(row))
        rows.append(torch.cat([torch.zeros(1, 48 - length, dtype=torch.long), text], 1))
        masks.append((torch.arange(48) >= 48 - length).long()[None])
    for pieces in ([48], [40, 1, 1, 1, 5], [30, 18]):
        together, cache = read("d2o:entries=10", pieces, model, torch.cat(rows), torch.cat(masks))
        for row, length in enumerate(lengths):
            text, pad = rows[row][:, 48 - length :], 48 - length
            alone, single = read("d2o:entries=10", [pieces[0] - pad, *pieces[1:]], model, text)
            torch.testing.assert_close(together[row, pad:], alone[0], atol=1e-6, rtol=1e-6)
            for many, one in zip(cache.layers, single.layers, strict=True):
                torch.testing.assert_close(many.state["threshold"][row], one.state["threshold"][0])


def test_without_its_parts_it_is_h2o():
    pieces = [40, 1, 1, 8, 1]
    ours, _ = read("d2o:keep=0.3,merging=false,budget=uniform", pieces)
    theirs, _ = read("h2o:keep=0.3,sinks=4", pieces)
    assert torch.equal(ours, theirs)
    policy = Recipe.of("d2o:keep=0.3").methods[0]
    assert policy.budget == Density() and str(policy) == "d2o:keep=0.3"


def test_the_total_is_never_exceeded():
    for pieces in ([40] + [1] * 5, [10] * 6):
        _, cache = read("d2o:entries=9,budget=density(sharpness=50)", pieces)
        held = torch.stack([layer.held()[0] for layer in cache.layers])
        assert int(held.sum()) <= 9 * held.numel()
        assert len(set(held.flatten().tolist())) > 1


def test_long_texts_are_compared_in_blocks(monkeypatch):
    keys, others = torch.randn(2, 2, 3, 11, 4).unbind()
    may = torch.rand(2, 3, 11) < 0.6
    whole = nearest(keys, others, may)
    monkeypatch.setattr("foveate.cache.d2o.BLOCK", 2 * 2 * 3 * 11)
    in_blocks = nearest(keys, others, may)
    torch.testing.assert_close(in_blocks[0], whole[0])
    assert torch.equal(in_blocks[1], whole[1])


def test_a_bad_ema_gets_a_sentence():
    with pytest.raises(FoveateError, match="outside"):
        D2O(keep=0.2, ema=1.5)
