"""A2SF: without forgetting it is H2O; forgetting favours what is recent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.models.tiny import tiny

MODEL = tiny("llama")
IDS = torch.randint(3, 200, (1, 60), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def read(recipe, pieces):
    cache, logits, start = None, [], 0
    with apply(MODEL, recipe):
        for size in pieces:
            out = MODEL(IDS[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            logits.append(out.logits)
    return torch.cat(logits, 1), [layer.positions for layer in cache.layers]


@settings(max_examples=15, deadline=None)
@given(pieces=st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_without_forgetting_it_is_h2o(pieces):
    ours, held = read("a2sf:entries=9,forget=1,recent=0.5", pieces)
    theirs, expected = read("h2o:entries=9", pieces)
    assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))


def test_what_is_kept_is_younger_the_more_is_forgotten():
    ages = []
    for forget in (1, 0.9, 0.1):
        _, held = read(f"a2sf:entries=12,forget={forget}", [30] + [1] * 30)
        ages.append(59 - torch.cat([positions.flatten() for positions in held]).float().mean())
    assert ages[0] > ages[1] > ages[2]


@pytest.mark.parametrize("forget", [0, 1.1, -1])
def test_a_factor_that_is_none_gets_a_sentence(forget):
    with pytest.raises(FoveateError, match="forget"):
        Recipe.of(f"a2sf:keep=0.2,forget={forget}")
