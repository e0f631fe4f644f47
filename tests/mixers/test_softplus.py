"""Softplus attention: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, Shape
from foveate.backbone.parts import rotated
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.softplus import SoftplusKeepsItsLossWithTheLength, weights
from foveate.tasks.base import Bench
from foveate.train.build import Sizes


def module_of(text="softplus", seed=0):
    torch.manual_seed(seed)
    return MIXERS.parse(text).build(Shape(32, 4)).double()


def units(*sizes):
    x = torch.randn(*sizes, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("power", [0, 1, 15])
def test_the_equations_token_by_token(power):
    module = module_of(f"softplus:power={power}")
    x = torch.randn(1, 9, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    q, k, v = module.qkv(x).view(1, 9, 3, 4, 8).unbind(2)
    q, k = (rotated(each / each.norm(dim=-1, keepdim=True))[0] for each in (q, k))
    rows = []
    for i in range(1, 10):
        heads = []
        for h in range(4):
            a = torch.log1p(torch.exp(math.log(8) * math.log(i) * (k[:i, h] @ q[i - 1, h])))
            a = a / a.sum()
            if power:
                a = (i * a - (1 if i > 3 else 0)).relu() ** power
                a = a / a.sum()
            heads.append(a @ v[0, :i, h])
        rows.append(module.out(torch.cat(heads)))
    torch.testing.assert_close(module(x)[0][0], torch.stack(rows))


def test_weights_are_shares_and_the_second_stage_sharpens():
    q, k = units(2, 4, 30, 8), units(2, 4, 30, 8)
    plain, sharp = weights(q, k, 0), weights(q, k, 15)
    for shares in (plain, sharp):
        torch.testing.assert_close(shares.sum(-1), torch.ones(2, 4, 30, dtype=torch.double))
        assert (shares >= 0).all() and (shares.triu(1) == 0).all()
    entropy = [torch.special.entr(shares)[..., 5:, :].sum(-1) for shares in (plain, sharp)]
    assert (entropy[1] < entropy[0]).all()
    below = plain * torch.arange(1, 31)[:, None] < 1
    assert (sharp[..., 5:, :][below[..., 5:, :]] == 0).all()


def test_a_large_row_does_not_overflow():
    q = units(1, 1, 1, 8).float()
    k = torch.cat([-q.expand(1, 1, 3999, 8), q], 2)  # one key that is meant, 3999 that are not: i A is near 4000
    shares = weights(q, k, 15)
    assert shares.isfinite().all() and shares[..., -1] > 0.99


def test_rows_without_anything_above_the_average_give_no_nan():
    q = units(1, 1, 1, 8).float().requires_grad_()
    shares = weights(q, q.expand(1, 1, 10, 8), 15)
    shares.square().sum().backward()
    assert shares.isfinite().all() and q.grad.isfinite().all()


def test_large_inputs_in_float16():
    module = MIXERS.parse("softplus").build(Shape(32, 4)).half()
    with torch.no_grad():
        module.qkv.weight[:64] *= 1000
        assert module(torch.randn(1, 20, 32).half())[0].isfinite().all()


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="power must be 1 or more to sharpen, or 0"):
        MIXERS.parse("softplus:power=0.5")
    with pytest.raises(FoveateError, match="heads of an even size, not 1"):
        MIXERS.parse("softplus").build(Shape(8, 8))


class Small(SoftplusKeepsItsLossWithTheLength):
    steps, seeds, sizes, length, times = 2, (0,), Sizes(width=32, layers=1), 16, (1, 4)


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert len(finding.checks) == 4
