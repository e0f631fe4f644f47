"""PoNet and FNet: their equations, the errors, the claim."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.backbone import MIXERS, Shape
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.fnet import FNetClaim
from foveate.mixers.ponet import PoNetClaim
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks.base import Bench
from foveate.train import Sizes


def plain(module, x, causal, size, window):
    """Token by token, head by head."""
    q, k, s, local, o = module.maps(x).chunk(5, -1)
    n, d, rows = x.shape[1], module.head, []
    means = q.cumsum(1) / torch.arange(1, n + 1, dtype=x.dtype)[:, None]
    for t in range(n):
        g = []
        for h in range(module.heads):
            of = slice(h * d, (h + 1) * d)
            if causal:
                scores = (means[:, : t + 1, of] * k[:, : t + 1, of]).sum(-1)
            else:
                scores = (q[:, :, of].mean(1, keepdim=True) * k[:, :, of]).sum(-1)
            weights = (scores / math.sqrt(d)).softmax(1).unsqueeze(-1)
            g.append((weights * k[:, : weights.shape[1], of]).sum(1))
        first = t // size * size
        segment = s[:, first : t + 1 if causal else first + size].amax(1)
        near = slice(max(0, t - window + 1), t + 1) if causal else slice(max(0, t - window // 2), t + window // 2 + 1)
        rows.append((torch.cat(g, -1) + segment) * o[:, t] + local[:, near].amax(1))
    return module.out(torch.stack(rows, 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size,window", [(5, 3), (16, 1), (1, 5)])
def test_it_is_its_equations(causal, size, window):
    torch.manual_seed(0)
    spec = f"ponet:segment={size},window={window},causal={str(causal).lower()}"
    module = MIXERS.parse(spec).build(Shape(16, 2)).double()
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], plain(module, x, causal, size, window))
    if causal:
        state, rows = module.start(2, x), []
        for piece in x.split([4, 1, 12, 6], 1):
            y, state = module(piece, state)
            rows.append(y)
        torch.testing.assert_close(torch.cat(rows, 1), module(x)[0])


def test_a_pooling_that_is_left_out_says_nothing():
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16)
    outs = []
    for without in ("", "global", "segment", "local"):
        torch.manual_seed(1)
        outs.append(MIXERS.parse(f"ponet:without={without}" if without else "ponet").build(Shape(16, 2))(x)[0])
    whole, *less = outs
    for each in less:
        assert not torch.allclose(whole, each)
    local = whole - less[2]
    torch.testing.assert_close(whole, less[0] + less[1] - local, atol=1e-5, rtol=1e-4)


def test_fnet_is_the_real_part_of_a_double_sum():
    module = MIXERS.parse("fnet").build(Shape(6, 2)).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    tokens, channels = (torch.arange(size, dtype=torch.float64) for size in (5, 6))
    turns = tokens[:, None, None, None] * tokens[None, None, :, None] / 5
    turns = turns + channels[None, :, None, None] * channels / 6
    mixed = torch.einsum("ucnd,bnd->buc", (2 * math.pi * turns).cos(), x) / math.sqrt(30)
    torch.testing.assert_close(module(x)[0], module.out(mixed))


def test_bad_settings_get_a_sentence():
    for spec, words in (
        ("ponet:segment=0", "must be at least 1"),
        ("ponet:window=4,causal=false", "has no token in its middle"),
        ("ponet:without=all", "there is no pooling 'all'"),
    ):
        with pytest.raises(FoveateError, match=words):
            MIXERS.parse(spec)
    for spec in ("ponet:causal=false", "fnet"):
        with pytest.raises(FoveateError, match="can't go step by step"):
            MIXERS.parse(spec).build(Shape(16, 2)).start(1, torch.zeros(1, 1, 16))


@pytest.mark.parametrize("claim", [PoNetClaim(), FNetClaim()])
def test_the_claims_run(claim):
    claim.steps, claim.batch, claim.seeds, claim.lengths, claim.rounds, claim.length = 2, 4, (0,), (16, 32), 2, 16
    claim.sizes = Sizes(width=16, heads=2, layers=1)
    found = claim.run(Bench(tiny("llama"), tiny_tokenizer(), load_text("prose")))
    assert all(torch.tensor([m.value, m.low, m.high]).isfinite().all() for m in found.metrics.values())
    assert all(isinstance(held, bool) for held in found.checks.values())
