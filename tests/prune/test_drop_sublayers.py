"""Dropping MLPs, and sublayers of both sorts: what is planted as idle leaves, and logits stay."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.methods import apply
from foveate.models.surgery import unit_counts
from foveate.models.tiny import TINY_FAMILIES, tiny

IDS = torch.randint(3, 120, (1, 48), generator=torch.Generator().manual_seed(1))


def silence(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_mlp_that_does_nothing_is_what_leaves(family):
    model = tiny(family)
    silence(fv.anatomy(model).layers[2].down)
    whole = model(IDS).logits
    with apply(model, "drop-mlp:keep=0.75", calibration=IDS):
        assert unit_counts(model, "mlp") == [1, 1, 0, 1]
        torch.testing.assert_close(model(IDS).logits, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_both_sorts_are_ranked_in_one_list(family):
    model = tiny(family)
    layers = fv.anatomy(model).layers
    silence(layers[0].o), silence(layers[1].down), silence(layers[1].o)
    whole = model(IDS).logits
    with apply(model, "drop-sublayers:keep=0.625", calibration=IDS):  # five of eight
        assert unit_counts(model, "attention") == [0, 0, 1, 1]
        assert unit_counts(model, "mlp") == [1, 0, 1, 1]
        torch.testing.assert_close(model(IDS).logits, whole, atol=1e-4, rtol=1e-4)
