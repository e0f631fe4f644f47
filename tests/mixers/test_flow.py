"""Flow-Attention: the authors' sums written out, conserved flows, the map of its claim."""

import math

import torch

from foveate.backbone import Shape
from foveate.backbone.parts import split_heads
from foveate.mixers.flow import EPS, FlowClaim, FlowMixer, attention
from foveate.mixers.linear import LinearMixer
from foveate.tasks.base import Bench
from foveate.train import build
from foveate.train.tasks import TRAIN_TASKS


def made(n=70):
    torch.manual_seed(0)
    return FlowMixer(Shape(32, 4)).double(), torch.randn(2, n, 32, dtype=torch.double)


def by_pairs(module, x):
    """y, token by token, from sums over all tokens before."""
    q, k, v = (each.transpose(1, 2) for each in split_heads(module.qkv(x), 12).chunk(3, 2))
    q, k = q.sigmoid(), k.sigmoid()
    n = x.shape[1]
    taken = [((q[:, :, t] + EPS) * (k[:, :, : t + 1].sum(2) + EPS)).sum(-1) for t in range(n)]
    given = [((k[:, :, t] + EPS) * (q[:, :, : t + 1].sum(2) + EPS)).sum(-1) for t in range(n)]
    to_sink, force, rows = [], [], []
    for t in range(n):
        sources = sum(k[:, :, j] * ((j + 1) / given[j])[..., None] for j in range(t + 1))
        sinks = sum(q[:, :, j] * ((j + 1) / taken[j])[..., None] for j in range(t + 1))
        to_sink.append(((q[:, :, t] + EPS) * (sources + EPS)).sum(-1) / (t + 1))
        force.append((((k[:, :, t] + EPS) * (sinks + EPS)).sum(-1) / (t + 1)).clamp(-1, 1).exp())
        share = [f / sum(force[: j + 1]) * (j + 1) for j, f in enumerate(force)]
        y = sum(((q[:, :, t] * k[:, :, j]).sum(-1) / taken[t] * share[j])[..., None] * v[:, :, j] for j in range(t + 1))
        rows.append(to_sink[t].sigmoid()[..., None] * y)
    return module.out(torch.stack(rows, 1).flatten(2))


def test_it_is_the_sums_written_out():
    module, x = made(24)
    torch.testing.assert_close(module(x)[0], by_pairs(module, x))


def test_what_sinks_take_and_sources_give_is_one():
    module, x = made()
    q, k, _ = split_heads(module.qkv(x), 12).sigmoid().chunk(3, 2)
    _, state = module(x, module.start(2, x))
    # After the last token: its own flows, from the sums that are held.
    taken = (q[:, -1] * state["sources"]).sum(-1)
    given = (k[:, -1] * state["sinks"]).sum(-1)
    torch.testing.assert_close((q[:, -1] / taken[..., None] * k.sum(1)).sum(-1), torch.ones(2, 4).double())
    torch.testing.assert_close((k[:, -1] / given[..., None] * q.sum(1)).sum(-1), torch.ones(2, 4).double())
    assert torch.equal(state["seen"], torch.tensor([70, 70]))


def test_with_equal_tokens_nobody_wins():
    module, x = made()
    same = x[:, :1].expand(-1, 70, -1)
    q, k, v = split_heads(module.qkv(same), 12).chunk(3, 2)
    y, _ = module(same)
    # Every flow is even, so that the mean of values is let through by the sigmoid of 1.
    torch.testing.assert_close(y, module.out((v * torch.sigmoid(torch.ones(()))).flatten(2)), atol=1e-4, rtol=1e-4)


def test_the_map_makes_the_output():
    module, x = made()
    weights = attention(module, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 70, dtype=torch.double))
    v = split_heads(module.qkv(x), 12)[:, :, 8:].transpose(1, 2)
    seen = []
    module.out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module(x)
    y, mixed = split_heads(seen[0], 4), (weights @ v).transpose(1, 2)
    scale = (y * mixed).sum(-1, keepdim=True) / mixed.square().sum(-1, keepdim=True)
    assert (scale > 0).all()  # rows are the map's, up to what the sink is allocated
    torch.testing.assert_close(y, scale * mixed, atol=1e-5, rtol=1e-4)
    plain = LinearMixer(Shape(32, 4)).double()
    v = split_heads(plain.qkv(x), 12)[:, :, 8:].transpose(1, 2)
    own = plain.out((attention(plain, x) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(plain(x)[0], own)


def test_the_claim_runs():
    class Short(FlowClaim):
        steps, seeds, length, tokens = 2, (0,), 12, (32, 128)

    finding = Short().run(Bench(build(TRAIN_TASKS.parse("mqar")), None, None))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["normalised flows are 1 to 1e-5"]
