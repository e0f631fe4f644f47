"""The selective scan: its plain form and its kernels against the loop over tokens, values and gradients.

The kernels run on a CUDA card, or under Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from foveate.errors import FoveateError  # noqa: E402
from foveate.kernels import selective_scan as module  # noqa: E402
from foveate.kernels.selective_scan import (  # noqa: E402
    available,
    linear_scan,
    selective_scan,
    selective_scan_by_steps,
    selective_scan_plain,
    selective_scan_triton,
)

DEVICE = "cuda" if CUDA else "cpu"
needs_kernel = pytest.mark.skipif(
    module.triton is None or not (CUDA or module.INTERPRETED), reason="needs a CUDA card or Triton's interpreter"
)
SHAPES = [(1, 1, 1, 1), (2, 37, 5, 3), (1, 16, 4, 16), (2, 19, 5, 8)]
"""batch, n, channels, states"""


def inputs(batch, n, channels, states, *, device="cpu", dtype=torch.float64, varying=True):
    size = (batch, n, states) if varying else (channels, states)
    given = [
        torch.randn(batch, n, channels),
        torch.rand(batch, n, channels),
        -4 * torch.rand(channels, states),
        torch.randn(size),
        torch.randn(size),
        torch.randn(batch, channels, states),
    ]
    return [x.to(device, dtype).requires_grad_() for x in given]


def gradients(scan, given):
    y, last = scan(*given)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x) for x in (y, last)]
    loss = sum((w * x.square()).sum() for w, x in zip(weights, (y, last), strict=True))
    return [y, last, *torch.autograd.grad(loss, given)]


def error(ours, exact):
    return float((ours.double() - exact).norm().detach() / exact.norm().detach().clamp_min(1e-9))


@pytest.fixture
def small_tiles(monkeypatch):
    """The interpreter is slow: several small chunks and blocks in place of one large one."""
    if not CUDA:
        monkeypatch.setattr(module, "CHUNK", 8)
        monkeypatch.setattr(module, "ELEMENTS", 16)


@pytest.mark.parametrize("varying", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_plain_form_is_the_recurrence(shape, varying):
    given = inputs(*shape, varying=varying)
    for ours, exact in zip(gradients(selective_scan, given), gradients(selective_scan_by_steps, given), strict=True):
        torch.testing.assert_close(ours, exact)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_agree_with_the_recurrence(shape, small_tiles):
    given = inputs(*shape, device=DEVICE, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in given]
    pairs = zip(gradients(selective_scan_triton, given), gradients(selective_scan_by_steps, exact), strict=True)
    assert max(error(ours, slow) for ours, slow in pairs) < 1e-5  # a card rounds exponentials a little more


@needs_kernel
def test_kernels_read_views(small_tiles):
    u, step, rates, b, c, before = (x.detach() for x in inputs(2, 20, 6, 4, device=DEVICE, dtype=torch.float32))
    wide = torch.cat([u, step], -1)
    ours = selective_scan_triton(wide[..., :6], wide[..., 6:], rates, b.mT.contiguous().mT, c, before)
    exact = selective_scan_plain(u, step, rates, b, c, before)
    assert max(error(x, y.double()) for x, y in zip(ours, exact, strict=True)) < 1e-6


@pytest.mark.parametrize("n", [2, 3, 4, 31, 64, 65, 200])
def test_pieces_and_any_length(n):
    given = [x.detach() for x in inputs(2, n, 3, 4)]
    whole, last = selective_scan_plain(*given)
    u, step, rates, b, c, state = given
    rows = []
    for at in (slice(0, n // 2), slice(n // 2, n - 1), slice(n - 1, n)):
        if at.stop > at.start:
            y, state = selective_scan_plain(u[:, at], step[:, at], rates, b[:, at], c[:, at], state)
            rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), whole)
    torch.testing.assert_close(state, last)


def test_strong_decays_stay_finite():
    """exp(step A) reaches 0 within a few tokens: nothing may be divided by it."""
    given = inputs(1, 300, 2, 4, dtype=torch.float32)
    given[1] = (40 * given[1].detach()).requires_grad_()
    found = gradients(selective_scan_plain, given)
    exact = gradients(selective_scan_by_steps, [x.detach().double().requires_grad_() for x in given])
    for ours, slow in zip(found, exact, strict=True):
        assert ours.isfinite().all() and error(ours, slow) < 1e-5


def test_scan_gradients_are_the_numeric_ones():
    decay, added, before = (torch.rand(shape, dtype=torch.double) for shape in ((2, 7, 2), (2, 7, 2), (2, 2)))
    given = [x.requires_grad_() for x in (decay, added, before)]
    assert torch.autograd.gradcheck(linear_scan, given)


def test_what_the_kernels_cannot_run_gets_a_sentence():
    given = inputs(1, 4, 2, 2)
    assert not available(given[0], given[3], given[4])
    with pytest.raises(FoveateError, match="the kernels take float32 on a CUDA card"):
        selective_scan_triton(*given)
