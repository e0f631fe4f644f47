"""TransNormer: its two attentions against their equations, which layer has which, its claim."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from foveate.backbone import MIXERS, Shape, state_bytes
from foveate.backbone.parts import rotated
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.transnormer import DiagMixer, NormMixer, TransNormer, TransNormerClaim, _bound, _gradients
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks.base import Bench


def heads_of(module, x):
    return module.qkv(x).unflatten(-1, (3, module.heads, module.head)).unbind(2)


def test_norm_attention():
    torch.manual_seed(0)
    module = NormMixer(Shape(32, 4)).double()
    torch.nn.init.normal_(module.norm)
    x = torch.randn(2, 90, 32, dtype=torch.float64)
    q, k, v = heads_of(module, x)
    scores = torch.einsum("bnhf,bmhf->bhnm", functional.elu(q) + 1, functional.elu(k) + 1).tril()
    y = torch.einsum("bhnm,bmhe->bnhe", scores, v).flatten(2)
    y = y / (y.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.norm
    torch.testing.assert_close(module(x)[0], module.out(y))


@pytest.mark.parametrize("n", [3, 8, 29])
def test_diag_attention(n):
    torch.manual_seed(0)
    module = DiagMixer(Shape(32, 4), 8).double()
    x = torch.randn(2, n, 32, dtype=torch.float64)
    q, k, v = heads_of(module, x)
    q, k = rotated(q), rotated(k)
    at = torch.arange(n)
    seen = (at[:, None] // 8 == at // 8) & (at[:, None] >= at)
    scores = torch.einsum("bnhf,bmhf->bhnm", q, k) / module.head**0.5
    y = torch.einsum("bhnm,bmhe->bnhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(module(x)[0], module.out(y.flatten(2)))


@pytest.mark.parametrize("block", [1, 4, 16])
def test_pieces_of_any_length_go_on_within_a_block(block):
    torch.manual_seed(0)
    module, x = DiagMixer(Shape(32, 4), block).double(), torch.randn(2, 50, 32, dtype=torch.float64)
    with torch.no_grad():
        whole, _ = module(x)
        for pieces in ([7, 1, 20, 22], [33, 17], [1, 1, 48]):
            state, rows = module.start(2, x), []
            for piece in x.split(pieces, 1):
                y, state = module(piece, state)
                rows.append(y)
            torch.testing.assert_close(torch.cat(rows, 1), whole)
        assert state_bytes(state) == 2 * (2 * (block - 1) * 32 * 8 + 8)


def test_a_block_sees_nothing_of_the_one_before():
    torch.manual_seed(0)
    module, x = DiagMixer(Shape(32, 4), 8), torch.randn(1, 24, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x)[0][0, 19].sum(), x)
    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == [16, 17, 18, 19]


def test_early_layers_have_blocks():
    def kinds(text, layers):
        return "".join(
            "d" if isinstance(MIXERS.parse(text).build(Shape(32, 4, i, layers)), DiagMixer) else "n"
            for i in range(layers)
        )

    assert kinds("transnormer", 4) == "ddnn" and kinds("transnormer", 5) == "ddnnn" and kinds("transnormer", 1) == "n"
    assert kinds("transnormer:early=0", 3) == "nnn" and kinds("transnormer:early=1", 3) == "ddd"


def test_the_denominator_is_what_makes_gradients_unbounded():
    divided, normed = _gradients(divided=True), _gradients(divided=False)
    assert 9.9 < divided[-1] / divided[-2] < 10.1  # as 1 over the weights
    assert normed[-1] < 1.01 * normed[-2] and max(normed) < _bound()


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="give 0 to 1"):
        TransNormer(early=1.5)
    with pytest.raises(FoveateError, match="at least 1 token"):
        TransNormer(block=0)
    with pytest.raises(FoveateError, match="heads of an even size, not 3"):
        TransNormer(early=1.0).build(Shape(12, 4))


def test_the_claim_runs():
    claim = TransNormerClaim()
    claim.steps, claim.seeds, claim.width = 2, (0,), 16
    found = claim.run(Bench(tiny("llama"), tiny_tokenizer(), load_text("prose")))
    assert all(torch.tensor([m.value, m.low, m.high]).isfinite().all() for m in found.metrics.values())
    assert all(isinstance(held, bool) for held in found.checks.values())
    assert found.metrics["largest gradient over its bound, norm"].value < 1
