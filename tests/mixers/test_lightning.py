"""Lightning attention: its equations, its decays, its claim."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from foveate.backbone import MIXERS, Shape
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.lightning import Lightning, LightningClaim
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks.base import Bench


def masked(module, x):
    """(Q K' * M) V over all tokens, with weights of softmax attention's shape."""
    q, k, v = functional.silu(module.qkv(x)).unflatten(-1, (3, module.heads, module.head)).unbind(2)
    n = x.shape[1]
    rates = torch.tensor([2.0 ** (-8 * (h + 1) / module.heads) for h in range(module.heads)], dtype=x.dtype)
    back = (torch.arange(n)[:, None] - torch.arange(n)).to(x.dtype)
    mask = (-rates[:, None, None] * (1 - module.later) * back).exp().tril()
    y = torch.einsum("bnhf,bmhf,hnm,bmhe->bnhe", q, k, mask, v).flatten(2)
    y = y / (y.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.norm
    return module.out(torch.sigmoid(module.gate(x)) * y)


@pytest.mark.parametrize("layer", [0, 2])
def test_tiles_are_masked_attention(layer):
    torch.manual_seed(0)
    module = Lightning().build(Shape(32, 4, layer, 3)).double()
    torch.nn.init.normal_(module.norm)
    x = torch.randn(2, 150, 32, dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], masked(module, x), atol=1e-6, rtol=1e-6)  # rates are of float64


def test_decays_are_weaker_in_later_layers_and_heads():
    first, last = (Lightning().build(Shape(32, 4, layer, 4)).decay(torch.zeros(1)) for layer in (0, 3))
    assert (first.diff() > 0).all() and first[-1] == -(2.0**-8)
    torch.testing.assert_close(last, first / 4)


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="strength must be above 0"):
        MIXERS.parse("lightning:strength=0")


def test_the_claim_runs():
    claim = LightningClaim()
    claim.width, claim.rounds, claim.lengths = 16, 2, (32, 64)
    found = claim.run(Bench(tiny("llama"), tiny_tokenizer(), load_text("prose")))
    assert all(torch.tensor([m.value, m.low, m.high]).isfinite().all() for m in found.metrics.values())
    assert all(isinstance(held, bool) for held in found.checks.values())
    assert found.checks["outputs and gradients are those of masked linear attention, to 1e-9"]
