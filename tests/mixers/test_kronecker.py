"""Third-order tensor attention: the definition, the polynomial form, the claim's task."""

import itertools
import math

import pytest
import torch

from foveate.backbone import Shape, state_bytes
from foveate.errors import FoveateError
from foveate.mixers import kronecker
from foveate.mixers.kronecker import (
    Kronecker,
    KroneckerClaim,
    Match3,
    exponents,
    monomials,
    tensor_attention,
    tensor_attention_by_degree,
)
from foveate.tasks.base import Bench
from foveate.train import build
from foveate.train.tasks import TRAIN_TASKS


def drawn(n=7, d=3, bound=1.0):
    torch.manual_seed(0)
    return [bound * (2 * torch.rand(2, n, 2, d, dtype=torch.double) - 1) for _ in range(5)]


def slow(q, k1, k2, v1, v2, kernel):
    """The definition, token by token and pair by pair."""
    y = torch.zeros_like(v1)
    for b, i, h in itertools.product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        total = 0.0
        for j, k in itertools.product(range(i + 1), repeat=2):
            weight = kernel((q[b, i, h] * k1[b, j, h] * k2[b, k, h]).sum() / math.sqrt(q.shape[-1]))
            y[b, i, h] += weight * v1[b, j, h] * v2[b, k, h]
            total += weight
        y[b, i, h] /= total
    return y


def test_the_exact_form_is_the_definition():
    given = drawn()
    torch.testing.assert_close(tensor_attention(*given), slow(*given, torch.exp))
    q, *rest = given
    torch.testing.assert_close(tensor_attention(q[:, 4:], *rest), slow(*given, torch.exp)[:, 4:])


def test_chunks_of_queries_change_nothing(monkeypatch):
    given = [x.requires_grad_() for x in drawn()]
    whole = tensor_attention(*given)
    grads = torch.autograd.grad(whole.square().sum(), given)
    monkeypatch.setattr(kronecker, "AT_ONCE", 2 * 2 * 7**2 * 2)
    parts = tensor_attention(*given)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), given), grads)


@pytest.mark.parametrize("degree", [2, 4])
def test_the_polynomial_form_is_its_definition(degree, monkeypatch):
    monkeypatch.setattr(kronecker, "FEATURE_CHUNK", 3)
    given = drawn(bound=2.0)

    def taylor(s):
        return sum(s**p / math.factorial(p) for p in range(degree + 1))

    y, _ = tensor_attention_by_degree(*given, table=exponents(3, degree))
    torch.testing.assert_close(y, slow(*given, taylor))


def test_monomials_are_all_and_add_up_to_the_polynomial():
    which, products = exponents(3, 4)
    assert len(which) == math.comb(7, 4)
    factors = 1 / (products * 3 ** ((which < 3).sum(1) / 2).double())
    x, y = torch.randn(2, 5, 3, dtype=torch.double)
    product = (monomials(x, which) * monomials(y, which) * factors).sum(-1)
    s = (x * y).sum(-1) / math.sqrt(3)
    torch.testing.assert_close(product, sum(s**p / math.factorial(p) for p in range(5)))


def test_with_a_degree_the_state_has_a_fixed_size_and_goes_on():
    torch.manual_seed(0)
    module = Kronecker(degree=2).build(Shape(32, 4))
    x, sizes = torch.randn(2, 80, 32), set()
    with torch.no_grad():
        whole, _ = module(x)
        for cuts in ([1] * 80, [70, 1, 9]):
            state, rows = module.start(2, x), []
            for piece in x.split(cuts, 1):
                y, state = module(piece, state)
                rows.append(y)
                sizes.add(state_bytes(state))
            torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-4, rtol=1e-4)
    assert len(sizes) == 1
    half, _ = module.bfloat16()(x.bfloat16())
    assert (half.float() - whole).norm() < 0.1 * whole.norm()


def test_bad_degrees_get_a_sentence():
    with pytest.raises(FoveateError, match="give an even degree, or 0 for the exact form"):
        Kronecker(degree=3)
    with pytest.raises(FoveateError, match="monomials of degree 4 for heads of 64 are too many"):
        Kronecker(degree=4).build(Shape(64, 1))


def test_match3_marks_triples():
    task = Match3(numbers=3, questions=4, modulus=7)
    inputs, targets = task.batch(16, "train", 0, torch.device("cpu"))
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert wanted[:3] == [-100] * 3
        for question, answer in zip(row[3:], wanted[3:], strict=True):
            pairs = itertools.product(row[:3], repeat=2)
            assert answer == any((a + b + question - 7) % 7 == 0 for a, b in pairs)
    asked = Match3().batch(512, "train", 0, torch.device("cpu")).targets[:, 6:]
    assert 0.45 < asked.float().mean() < 0.55


def test_the_claim_runs():
    class Short(KroneckerClaim):
        steps, seeds, width, lengths = 3, (0,), 32, (16, 32)

    finding = Short().run(Bench(build(TRAIN_TASKS.parse("mqar")), None, None))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert len(finding.checks) == 5 and all(isinstance(each, bool) for each in finding.checks.values())
