"""Gated linear attention: the recurrence written out, its gate, settings."""

import math

import pytest
import torch

from foveate.backbone import MIXERS, Shape
from foveate.backbone.parts import split_heads
from foveate.errors import FoveateError
from foveate.mixers.gated_linear import GatedLinear, GatedLinearClaim
from foveate.tasks.base import Bench
from foveate.train import build
from foveate.train.tasks import TRAIN_TASKS


def made(**settings):
    torch.manual_seed(0)
    return GatedLinear(**settings).build(Shape(32, 4)).double(), torch.randn(2, 40, 32, dtype=torch.double)


@pytest.mark.parametrize("settings", [{}, {"normaliser": 1.0, "keys": 1.0}, {"normaliser": 0}])
def test_it_is_the_recurrence_written_out(settings):
    module, x = made(**settings)
    q, k = split_heads(module.qk(x), 8).chunk(2, 2)
    v, f = split_heads(module.v(x), 4), q.shape[-1]
    gate = torch.ones_like(k)
    if module.gate is not None:
        gate = split_heads(module.gate(x), 4).sigmoid() ** (1 / module.normaliser)
    memory, rows = torch.zeros(2, 4, f, 8, dtype=torch.double), []
    for t in range(40):
        memory = gate[:, t, :, :, None] * memory + k[:, t, :, :, None] * v[:, t, :, None]
        o = torch.einsum("bhf,bhfd->bhd", q[:, t], memory) / math.sqrt(f)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        r = x[:, t] @ module.out_gate.weight.T + module.out_gate.bias
        rows.append(module.out(o.flatten(1) * r * r.sigmoid()))
    torch.testing.assert_close(module(x)[0], torch.stack(rows, 1))


def test_memories_last_at_the_start():
    module, x = made()
    stays = split_heads(module.gate(x), 4).sigmoid() ** (1 / 16)
    assert stays.mean() > 0.93 and stays.min() > 0.7


def test_the_state_hangs_on_the_keys():
    for keys, feature in ((0.5, 4), (1.0, 8)):
        module, x = made(keys=keys)
        assert module.start(3, x)["memory"].shape == (3, 4, feature, 8)


def test_settings_that_can_not_be():
    with pytest.raises(FoveateError, match="normaliser 0 or more"):
        MIXERS.parse("gated-linear:normaliser=-1")
    with pytest.raises(FoveateError, match="rank must be 1 or more"):
        MIXERS.parse("gated-linear:rank=0")
    with pytest.raises(FoveateError, match="leave no channel to each of 4 heads"):
        GatedLinear(keys=0.01).build(Shape(32, 4))


def test_the_claim_runs():
    class Short(GatedLinearClaim):
        steps, seeds, lengths = 2, (0,), (12, 24)

    finding = Short().run(Bench(build(TRAIN_TASKS.parse("mqar")), None, None))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
