"""Key norm: the entries with small keys stay."""

from dataclasses import fields

import pytest
import torch

import foveate as fv
from foveate.cache.entries import CacheView
from foveate.methods import Recipe


def scores(norms):
    """Of entries whose keys have these norms, in a text of nothing else."""
    given = {
        "keys": torch.stack([norms, torch.zeros_like(norms)], -1)[None, None],
        "positions": torch.arange(len(norms), dtype=torch.int32)[None, None],
        "seen": torch.tensor([[[len(norms)]]]),
    }
    view = CacheView(**{f.name: given.get(f.name) for f in fields(CacheView)})
    return Recipe.of("key-norm:keep=0.5").methods[0].score(view)[0, 0]


def test_the_smallest_keys_stay():
    model, ids = fv.tiny("llama"), torch.arange(3, 43).unsqueeze(0)
    keys = model(ids, use_cache=True).past_key_values.layers[0].keys[0, 0]
    smallest = keys[:-1].norm(dim=-1).topk(7, largest=False).indices.tolist()
    with fv.apply(model, "key-norm:entries=8"):
        out = model(ids, use_cache=True)
    assert out.past_key_values.layers[0].positions[0, 0].tolist() == [*sorted(smallest), 39]  # the last always stays


def test_of_equal_keys_the_latest_stay():
    assert scores(torch.full((500,), 3.0)).diff().min() > 0


@pytest.mark.parametrize("length", [1_000, 100_000])
def test_age_decides_between_near_ties_only(length):
    norms = torch.full((length,), 3.0)
    norms[0] *= 1 - 2e-4
    assert scores(norms).argmax() == 0
