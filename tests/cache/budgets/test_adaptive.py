"""Adaptive: known attention gives known fractions; heads that gather on few tokens keep fewer, within the total."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from foveate.cache.budgets.adaptive import Adaptive
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
    return Adaptive(**settings).measure(view)[0].tolist()


@pytest.mark.parametrize(
    "mass,needed", [(0.5, 1), (0.8, 1), (0.81, 2), (0.9, 2), (0.95, 3), (0.975, 3), (0.99, 3), (0.999, 4), (1.0, 4)]
)
def test_known_answers(mass, needed):
    assert weights([[8.0, 0.25, 80.0, 0.0, 11.75]], mass=mass) == pytest.approx([needed / 5])
    assert weights([[8.0, 9.0, 0.25, 80.0, 0.0, 11.75]], [[0, -1, 1, 2, 3, 4]], mass=mass) == pytest.approx(
        [needed / 5]
    )


def test_heads_together_or_each_by_itself():
    gathers, spreads = [10.0, 0.0, 0.0, 0.0], [2.5, 2.5, 2.5, 2.5]
    assert weights([gathers, spreads], heads=True) == pytest.approx([1 / 4, 1])
    assert weights([gathers, spreads]) == pytest.approx([1, 1])
    assert weights([gathers, spreads], mass=0.8) == pytest.approx([3 / 4] * 2)  # of 12.5, 2.5, 2.5, 2.5: 16
    # The same token in other slots: positions 0, 4, 7 received 6, 6, 8 of both heads together; 2 received 0.
    both = weights([[6.0, 4.0, 0.0], [0.0, 6.0, 4.0]], [[0, 7, -1], [2, 4, 7]], mass=0.6)
    assert both == pytest.approx([2 / 4] * 2)


def gathering(model, layer):
    """A GPT-2 in one layer of which all queries are the same, and look at the same few tokens."""
    inner = model.transformer.h[layer].attn.c_attn  # queries, keys and values side by side
    with torch.no_grad():
        inner.weight[:, :64] = 0
        inner.bias[:64] = 100 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("fields", ["", "(heads=true)", "(mass=0.6,heads=true)"])
@pytest.mark.parametrize("policy", ["h2o", "streaming"])
@pytest.mark.parametrize("pieces", [[40], [20, 12, 1, 1, 6], [30] + [1] * 10])
def test_where_attention_gathers_less_is_kept_and_the_total_is_kept(policy, pieces, fields):
    model = gathering(tiny("gpt2"), 2)
    cache, start = None, 0
    with apply(model, f"{policy}:keep=0.3,budget=adaptive{fields}", context=40), torch.no_grad():
        for size in pieces:
            cache = model(IDS[:, start : start + size], past_key_values=cache, use_cache=True).past_key_values
            start += size
            held = torch.stack([layer.held()[0] for layer in cache.layers])
            if start > 20:
                assert int(held.sum()) <= 12 * held.numel()
    assert int(held[2].sum()) < int(held[[0, 1, 3]].sum(-1).min())


def test_a_bad_mass_gets_a_sentence():
    with pytest.raises(FoveateError, match="outside"):
        Adaptive(mass=0.0)
