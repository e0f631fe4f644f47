"""Budgets: any policy takes any of them; the total is never exceeded; what a head doesn't hold takes no memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.cache.budgets import BUDGETS, EVERYTHING, Budget, allot, budget
from foveate.cache.packed import Packed
from foveate.errors import FoveateError
from foveate.methods import Recipe, Target, apply
from foveate.models.anatomy import anatomy
from foveate.models.caches import cache_bytes
from foveate.models.tiny import tiny

MODEL = tiny("llama")
KV_HEADS = anatomy(MODEL).kv_heads
IDS = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(1))


@budget("test-ragged")
class Ragged(Budget):
    """Another weight for every head; the first head keeps everything."""

    claim = "for tests"

    def weights(self, target: Target, keep: float | None) -> torch.Tensor:
        parts = anatomy(target.model)
        weights = torch.arange(1.0, 1 + len(parts.layers) * parts.kv_heads).view(len(parts.layers), parts.kv_heads)
        weights[0, 0] = EVERYTHING
        return weights


@budget("test-measured")
class Measured(Budget):
    """By what the last entry received in each layer: only known when all layers have been read."""

    claim = "for tests"
    measured = True

    def measure(self, view):
        return view.received[..., -1] + 0.1


NAMES = ["pyramid", "uniform", "test-ragged", "test-measured"]


@given(
    weights=st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5, 40.0, EVERYTHING]), min_size=1, max_size=12),
    mean=st.integers(3, 60),
    most=st.integers(3, 80),
)
def test_allot_keeps_to_its_bounds_and_its_total(weights, mean, most):
    given = allot(torch.tensor(weights), mean, 3, most)
    assert int(given.min()) >= min(3, most) and int(given.max()) <= most
    assert int(given.sum()) <= mean * len(weights)
    if mean < most and any(weights):
        room = sum(w > 0 for w, g in zip(weights, given.tolist(), strict=True) if g < most)
        spent = int(given.sum()) > mean * len(weights) - len(weights) - 1
        assert spent or room == 0  # all is spent but for rounding, unless nobody who weighs anything can use it
    order = sorted(zip(weights, given.tolist(), strict=True))
    assert [g for _, g in order] == sorted(g for _, g in order)


def read(ids, pieces, recipe, model=MODEL, **options):
    cache, logits, start = None, [], 0
    with apply(model, recipe, **options), torch.no_grad():
        for size in pieces:
            out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["window", "streaming", "h2o", "random"])
def test_any_policy_takes_any_budget(name, policy):
    for pieces in ([40], [20, 12, 1, 1, 6], [30] + [1] * 10):
        ones, _ = read(IDS, pieces, f"{policy}:keep=1")
        ours, _ = read(IDS, pieces, f"{policy}:keep=1,budget={name}")
        torch.testing.assert_close(ours, ones, atol=1e-4, rtol=1e-4)
        _, cache = read(IDS, pieces, f"{policy}:keep=0.3,budget={name}", context=40)
        held = torch.stack([layer.held()[0] for layer in cache.layers])
        assert int(held.sum()) <= 12 * held.numel()
        if name != "uniform":
            assert len(set(held.flatten().tolist())) > 1
            packed = any(isinstance(layer.entries, Packed) for layer in cache.layers)
            assert packed == (name != "pyramid")  # in a pyramid, the heads of a layer are alike
        if name == "test-ragged":
            assert int(held[0, 0]) == 40
        for layer in cache.layers:
            for head in layer.positions[0].tolist():
                live = [p for p in head if p >= 0]
                assert live == sorted(set(live)) and live[-1] == 39


def test_ragged_heads_take_no_more_than_they_hold():
    _, cache = read(IDS, [40], "window:keep=0.3,budget=test-ragged")
    held = sum(int(layer.held().sum()) for layer in cache.layers)
    entry = 2 * anatomy(MODEL).head_dim * 4
    runs = 2 * 4 * KV_HEADS * len(cache.layers)  # a window is one run of positions
    counts = 4 * KV_HEADS * len(cache.layers)
    assert cache_bytes(cache) <= held * entry + runs + counts


@pytest.mark.parametrize("recipe", ["h2o:keep=0.3,budget=test-ragged", "streaming:keep=0.3,budget=test-measured"])
def test_a_batch_with_padding_is_each_alone(recipe):
    short = IDS[:, 7:]
    batch = torch.cat([IDS, torch.cat([IDS[:, :7] * 0, short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :7] = 0
    with apply(MODEL, recipe):
        both = MODEL.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        beams = MODEL.generate(
            batch, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0
        )
        for row, ids in ((0, IDS), (1, short)):
            alone = MODEL.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            assert torch.equal(both[row, -6:], alone[0, -6:])
            alone = MODEL.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
            assert torch.equal(beams[row, -6:], alone[0, -6:])


@settings(max_examples=8, deadline=None)
@given(pieces=st.lists(st.integers(1, 9), min_size=2, max_size=6), name=st.sampled_from(NAMES))
def test_packing_changes_nothing(pieces, name):
    """The same text with the entries unpacked between all forwards."""
    recipe = f"h2o:entries=9,budget={name}"
    ours, _ = read(IDS, pieces, recipe)
    cache, logits, start = None, [], 0
    with apply(MODEL, recipe), torch.no_grad():
        for size in pieces:
            out = MODEL(IDS[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            for layer in cache.layers:
                layer.entries = layer.padded
            logits.append(out.logits)
    assert torch.equal(torch.cat(logits, 1), ours)


def test_what_the_text_form_looks_like():
    recipe = Recipe.of("h2o:keep=0.2,budget=pyramid(slope=3),recent=0.4+window:keep=1".rpartition("+")[0])
    assert str(recipe) == "h2o:keep=0.2,budget=pyramid(slope=3.0),recent=0.4"
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe == Recipe.of(str(recipe))
    assert str(Recipe.of("h2o:keep=0.2,budget=uniform")) == "h2o:keep=0.2"


@pytest.mark.parametrize(
    "text,says",
    [
        ("h2o:keep=0.2,budget=piramid", "did you mean pyramid"),
        ("h2o:keep=0.2,budget=pyramid(slop=3)", "did you mean slope"),
        ("h2o:keep=0.2,budget=pyramid(slope=0.5)", "below 1"),
        ("h2o:keep=0.2,budget=pyramid(slope=3", "bracket"),
    ],
)
def test_bad_budgets_get_a_sentence(text, says):
    with pytest.raises(FoveateError, match=says):
        Recipe.of(text)


def test_budgets_say_what_they_are():
    for name, cls in BUDGETS.all().items():
        assert cls.claim and cls.__doc__, name
