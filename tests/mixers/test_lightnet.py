"""LightNet: the additive recurrence written out, its order, its positions, its range."""

import math

import pytest
import torch
from torch.nn import functional

from foveate.backbone import Shape
from foveate.backbone.parts import split_heads
from foveate.mixers.lightnet import LightNet, LightNetClaim, Marks, turned
from foveate.tasks.base import Bench
from foveate.train import build
from foveate.train.tasks import TRAIN_TASKS


def made(n=40, layer=0, **settings):
    torch.manual_seed(0)
    module = LightNet(**settings).build(Shape(32, 4, layer, 2)).double()
    return module, torch.randn(2, n, 32, dtype=torch.double)


def written_out(module, x):
    """y by S_t = (g_(t-1) / g_t) S_(t-1) + (exp(k_t) / g_t) v_t', with places that turn queries and keys."""
    if module.fade is not None:
        fade, filtered = module.fade.sigmoid().repeat_interleave(8), []
        for t in range(x.shape[1]):
            filtered.append(x[:, t] + (fade * filtered[-1] if t else 0))
        x = x + module.strength * torch.stack(filtered, 1)
    q, k, v = split_heads(module.qkv(x), 12).chunk(3, 2)
    q, k = functional.silu(q), 30 * (k / 30).tanh()
    total, rows = torch.zeros_like(k[:, 0]), []
    memory = torch.zeros(2, 4, 16 if module.lrpe else 8, 8, dtype=torch.double)
    for t in range(x.shape[1]):
        before, total = total, total + k[:, t].exp()
        stays, enters, asks = before / total, k[:, t].exp() / total, q[:, t]
        if module.lrpe:
            angles = t * 10_000.0 ** (-torch.arange(8, dtype=torch.double) / 8)
            enters, asks = (torch.cat([e * angles.cos(), e * angles.sin()], -1) for e in (enters, asks))
            stays = torch.cat([stays, stays], -1)
        memory = stays[..., None] * memory + enters[..., None] * v[:, t, :, None]
        rows.append(torch.einsum("bhf,bhfd->bhd", asks, memory).flatten(1))
    o = torch.stack(rows, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return module.out(o * module.gate(x).sigmoid())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tpe, lrpe", [(True, True), (False, True), (True, False), (False, False)])
def test_it_is_the_recurrence_written_out(tpe, lrpe, layer):
    module, x = made(layer=layer, tpe=tpe, lrpe=lrpe)
    assert (module.fade is not None) == (tpe and layer == 0)
    torch.testing.assert_close(module(x)[0], written_out(module, x))


def test_everywhere_is_what_the_last_token_of_the_scan_sees():
    module, x = made(tpe=False, lrpe=False)
    torch.testing.assert_close(module.everywhere(x)[:, -1], module(x)[0][:, -1])
    order = torch.randperm(40)
    torch.testing.assert_close(module.everywhere(x[:, order]), module.everywhere(x)[:, order])
    turning, _ = made(tpe=False)
    torch.testing.assert_close(turning.everywhere(x, torch.arange(40)[:, None])[:, -1], turning(x)[0][:, -1])


def test_products_of_turned_vectors_hang_on_distances_in_each_axis():
    q, k = torch.rand(2, 1, 1, 1, 8, dtype=torch.double).unbind()

    def product(here, there):
        return (turned(q, torch.tensor([[here]])) * turned(k, torch.tensor([[there]]))).sum()

    torch.testing.assert_close(product([3, 5], [1, 9]), product([10, 15], [8, 19]))
    assert not torch.isclose(product([3, 5], [1, 9]), product([3, 5], [9, 1]))
    torch.testing.assert_close(product([4, 2], [4, 2]), (q * k).sum())


def test_large_keys_stay_finite():
    module, x = made(n=300)
    module = module.float()
    with torch.no_grad():
        module.qkv.weight[32:64].mul_(500)
    x = x.float()[:, :, :].requires_grad_()
    y, _ = module(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(each.grad.isfinite().all() for each in module.parameters())


def test_marks_are_two_and_their_sum_is_the_class():
    batch = Marks(side=4).batch(20, "train", 0, torch.device("cpu"))
    for cells, target in zip(batch.inputs, batch.targets, strict=True):
        marked = cells[cells > 0] - 1
        assert len(marked) == 2 and marked.sum() % 4 == target


def test_the_claim_runs():
    class Short(LightNetClaim):
        steps, seeds, side = 2, (0,), 4

    finding = Short().run(Bench(build(TRAIN_TASKS.parse("mqar")), None, None))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["the additive state is the same in any order, the other is not"]
