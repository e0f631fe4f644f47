"""TransNormerLLM's mixer: its equations in complex numbers, its decays, its claim."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from foveate.backbone import MIXERS, Shape
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.transnormerllm import TransNormerLLM, TransNormerLLMClaim, _turns
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks.base import Bench


def by_pairs(module, x, rates):
    """The sum over all pairs of tokens, with the positions as complex factors."""
    n, heads, head = x.shape[1], module.heads, module.head
    q, k, v, u = module.qkvu(x).unflatten(-1, (4, heads, head)).unbind(2)
    back = (torch.arange(n)[:, None] - torch.arange(n)).to(x.dtype)
    theta = torch.zeros(heads, head, dtype=x.dtype) if module.theta is None else module.theta
    turns = torch.polar(torch.ones(n, n, heads, head, dtype=x.dtype), back[..., None, None] * theta)
    q, k = functional.silu(q), functional.silu(k)
    scores = torch.einsum("bnhf,bmhf,nmhf->bhnm", q.to(turns.dtype), k.to(turns.dtype), turns).real
    scores = scores * (torch.tensor(rates, dtype=x.dtype)[:, None, None] * back).exp().tril()
    y = torch.einsum("bhnm,bmhe->bnhe", scores, v).flatten(2)
    y = y / (y.square().mean(-1, keepdim=True) + module.eps).sqrt()
    return module.out(y * u.flatten(2))


@pytest.mark.parametrize("positions", ["first", "all", "none"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_equations(layer, positions):
    torch.manual_seed(0)
    module = TransNormerLLM(positions=positions).build(Shape(32, 4, layer, 2)).double()
    assert (module.theta is not None) == (positions == "all" or (positions == "first" and layer == 0))
    x = torch.randn(2, 90, 32, dtype=torch.float64)
    rates = [-8.0 * h / 4 * (1 - layer / 2) for h in range(4)]
    torch.testing.assert_close(module(x)[0], by_pairs(module, x, rates), atol=1e-6, rtol=1e-6)


def test_without_decay():
    torch.manual_seed(0)
    module = TransNormerLLM(decay=0.0).build(Shape(32, 4)).double()
    x = torch.randn(1, 70, 32, dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], by_pairs(module, x, [0.0] * 4), atol=1e-6, rtol=1e-6)


def test_angles_begin_as_the_paper_has_them_and_go_on_with_the_text():
    module = TransNormerLLM().build(Shape(32, 4))
    torch.testing.assert_close(module.theta.flatten(), 10_000.0 ** (-2 * torch.arange(32) / 32))
    cos, _ = _turns(module.theta, 9, None)
    torch.testing.assert_close(_turns(module.theta, 4, torch.tensor([5, 2]))[0][0], cos[0, 5:])


def test_steps_stay_stable_where_the_inverse_decay_would_overflow():
    torch.manual_seed(0)
    module = TransNormerLLM(decay=40.0).build(Shape(16, 2))
    x = torch.randn(1, 300, 16)
    assert not torch.exp(-300 * module.decay(x)).isfinite().all()
    with torch.no_grad():
        whole, _ = module(x)
        y, state = module(x[:, :299], module.start(1, x))
        last, _ = module(x[:, 299:], state)
    torch.testing.assert_close(torch.cat([y, last], 1), whole, atol=1e-4, rtol=1e-4)


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="decay must be 0"):
        MIXERS.parse("transnormerllm:decay=-1")
    with pytest.raises(FoveateError, match="no positions 'rope': give first, all or none"):
        MIXERS.parse("transnormerllm:positions=rope")


def test_the_claim_runs():
    claim = TransNormerLLMClaim()
    claim.steps, claim.seeds, claim.width, claim.long, claim.rounds = 2, (0,), 16, 64, 2
    claim.stepped = 100
    found = claim.run(Bench(tiny("llama"), tiny_tokenizer(), load_text("prose")))
    assert all(torch.tensor([m.value, m.low, m.high]).isfinite().all() for m in found.metrics.values())
    assert all(isinstance(held, bool) for held in found.checks.values())
    assert found.checks["whole and steps agree to 1e-3, where lambda^-t overflows"]


def test_in_bfloat16_far_positions_stay_what_they_are():
    import copy

    torch.manual_seed(0)
    module = TransNormerLLM().build(Shape(32, 4)).eval()
    x = torch.randn(1, 3000, 32)
    with torch.no_grad():
        exact, half = module(x)[0][:, -500:], copy.deepcopy(module).bfloat16()(x.bfloat16())[0][:, -500:].float()
    assert float((half - exact).norm() / exact.norm()) < 0.03
