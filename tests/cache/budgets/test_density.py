"""Density: known variances give known weights; a layer of dense attention keeps more, within the total."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from foveate.cache.budgets.density import Density
from foveate.cache.entries import CacheView
from foveate.errors import FoveateError
from foveate.methods import apply
from foveate.models.tiny import tiny

IDS = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(1))


def weights(received, positions=None, **settings):
    """The weights for `received`, (kv_head, entry) in lists."""
    received = torch.tensor([received])
    if positions is None:
        positions = [list(range(received.shape[-1]))] * received.shape[1]
    given = {"positions": torch.tensor([positions], dtype=torch.int32), "received": received}
    view = CacheView(**{f.name: given.get(f.name) for f in fields(CacheView)})
    return Density(**settings).measure(view)[0].tolist()


def test_known_answers():
    assert weights([[2.0, 2.0, 2.0, 2.0]]) == pytest.approx([1.0])  # even
    assert weights([[0.0, 7.0, 0.0, 0.0]]) == pytest.approx([math.exp(-1)])  # all on one
    # Shares 1/2, 1/2, 0, 0 have the variance 1/16; all on one, it is 3/16.
    assert weights([[3.0, 3.0, 0.0, 0.0]]) == pytest.approx([math.exp(-1 / 3)])
    assert weights([[3.0, 3.0, 0.0, 0.0]], sharpness=6) == pytest.approx([math.exp(-2)])
    assert weights([[3.0, 3.0, 0.0, 0.0]], sharpness=0) == pytest.approx([1.0])
    assert weights([[5.0, 5.0], [5.0, 0.0]]) == pytest.approx([math.exp(-1 / 2)] * 2)  # the heads' mean, for both


def test_empty_slots_and_single_entries():
    padded = weights([[9.0, 9.0, 3.0, 3.0, 0.0, 0.0]], [[-1, -1, 0, 1, 2, 3]])
    assert padded == pytest.approx(weights([[3.0, 3.0, 0.0, 0.0]]))
    assert weights([[4.0]]) == pytest.approx([1.0])
    assert weights([[8.0, 4.0]], [[-1, 0]]) == pytest.approx([1.0])


def gathering(model, layer):
    """A GPT-2 in one layer of which all queries are the same, and look at the same few tokens."""
    inner = model.transformer.h[layer].attn.c_attn  # queries, keys and values side by side
    with torch.no_grad():
        inner.weight[:, :64] = 0
        inner.bias[:64] = 100 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("policy", ["h2o", "streaming"])
@pytest.mark.parametrize("pieces", [[40], [20, 12, 1, 1, 6], [30] + [1] * 10])
def test_a_dense_layer_keeps_more_and_the_total_is_kept(policy, pieces):
    model = gathering(tiny("gpt2"), 2)
    cache, start = None, 0
    with apply(model, f"{policy}:keep=0.3,budget=density(sharpness=4)", context=40), torch.no_grad():
        for size in pieces:
            cache = model(IDS[:, start : start + size], past_key_values=cache, use_cache=True).past_key_values
            start += size
            held = torch.stack([layer.held()[0] for layer in cache.layers])
            if start > 20:
                assert int(held.sum()) <= 12 * held.numel()
    assert int(held[2].max()) < int(held[[0, 1, 3]].min())


def test_a_bad_sharpness_gets_a_sentence():
    with pytest.raises(FoveateError, match="negative"):
        Density(sharpness=-1)
