"""Attention as an RNN: its three forms, and its range."""

import math

import pytest
import torch

from foveate.backbone import Shape
from foveate.backbone.parts import split_heads
from foveate.mixers.aaren import AarenClaim, AarenMixer, Series, Stretch, combined, prefixes
from foveate.tasks.base import Bench
from foveate.train import build
from foveate.train.tasks import TRAIN_TASKS


def parts(n, scale=1.0):
    scores = scale * torch.randn(2, n, 3, dtype=torch.double)
    return Stretch(scores, torch.randn(2, n, 3, 4, dtype=torch.double), torch.ones_like(scores))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 64, 65])
def test_the_scan_is_the_running_softmax(n):
    given = parts(n)
    scan = prefixes(given)
    for t in range(n):
        weights = given.top[:, : t + 1].softmax(1)
        y = (weights.unsqueeze(-1) * given.total[:, : t + 1]).sum(1)
        torch.testing.assert_close(scan.total[:, t] / scan.weight[:, t].unsqueeze(-1), y)
        assert torch.equal(scan.top[:, t], given.top[:, : t + 1].amax(1))


def test_combining_is_associative():
    a, b, c = (parts(5) for _ in range(3))
    for left, right in zip(combined(combined(a, b), c), combined(a, combined(b, c)), strict=True):
        torch.testing.assert_close(left, right)


def test_the_mixer_is_attention_with_a_learned_query():
    torch.manual_seed(0)
    module = AarenMixer(Shape(32, 4)).double()
    x = torch.randn(2, 19, 32, dtype=torch.double)
    k, v = split_heads(module.kv(x), 8).chunk(2, 2)
    rows = []
    for t in range(19):
        scores = torch.einsum("bnhd,hd->bnh", k[:, : t + 1], module.query) / math.sqrt(8)
        rows.append((scores.softmax(1).unsqueeze(-1) * v[:, : t + 1]).sum(1).flatten(1))
    slow = module.out(torch.stack(rows, 1))
    fast, _ = module(x)
    torch.testing.assert_close(fast, slow)
    for parameter in module.parameters():  # also what flows back, past the running maximum
        ours, theirs = (torch.autograd.grad(y.square().sum(), parameter, retain_graph=True)[0] for y in (fast, slow))
        torch.testing.assert_close(ours, theirs)


def test_large_scores_stay_finite():
    module = AarenMixer(Shape(32, 4))
    with torch.no_grad():
        module.query.mul_(1000)
    y, _ = module(torch.randn(1, 50, 32))
    y.sum().backward()
    assert y.isfinite().all() and module.query.grad.isfinite().all()


def test_series_have_mean_0_and_variance_1_and_are_shifted_by_a_token():
    batch = Series(patches=10, patch=4).batch(6, "train", 0, torch.device("cpu"))
    assert batch.inputs.shape == batch.targets.shape == (6, 10, 4)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    whole = torch.cat([batch.inputs, batch.targets[:, -1:]], 1).flatten(1)
    torch.testing.assert_close(whole.mean(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std(1), torch.ones(6))


def test_the_claim_runs():
    class Short(AarenClaim):
        steps, seeds, width = 3, (0,), 32

    model = build(TRAIN_TASKS.parse("mqar"))
    finding = Short().run(Bench(model, None, None))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert len(finding.checks) == 4 and all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.metrics["largest difference of scan, steps and plain softmax"].value < 1e-5
