"""Mixture-of-head attention: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, Shape
from foveate.backbone.parts import rotated
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.mixture_of_heads import MixtureOfHeadsBeatsAllHeads
from foveate.tasks.base import Bench
from foveate.train.build import Sizes


def module_of(text="mixture-of-heads", heads=4):
    torch.manual_seed(0)
    return MIXERS.parse(text).build(Shape(32, heads)).double()


def texts(n=11):
    return torch.randn(2, n, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def by_hand(module, x):
    """One text, token by token and head by head."""
    heads, d = module.heads, 32 // module.heads
    q, k, v = module.qkv(x).view(len(x), 3, heads, d).unbind(1)
    q, k = rotated(q[None])[0], rotated(k[None])[0]
    rows = []
    for t, token in enumerate(x):
        p = module.route(token).softmax(0)
        chosen = p.argsort(descending=True)[: module.chosen].tolist()
        a, b = (2 * module.route_kinds(token).softmax(0)).tolist() if module.shared else (0.0, 1.0)
        out = torch.zeros(32, dtype=torch.double)
        for i in range(heads):
            if i < module.shared:
                own = 1.0 if module.shared == 1 else float(module.route_shared(token).softmax(0)[i])
                gate = a * module.shared * own
            elif i - module.shared in chosen:
                gate = b * module.chosen * float(p[i - module.shared] / p[chosen].sum())
            else:
                continue
            weights = (k[: t + 1, i] @ q[t, i] / math.sqrt(d)).softmax(0)
            out += gate * module.out.weight[:, i * d : (i + 1) * d] @ (weights @ v[: t + 1, i])
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "text", ["mixture-of-heads", "mixture-of-heads:shared=2", "mixture-of-heads:shared=0,active=0.5"]
)
def test_it_is_its_equations(text):
    module, x = module_of(text), texts()
    with torch.no_grad():
        y, _ = module(x)
        for i in range(2):
            torch.testing.assert_close(y[i], by_hand(module, x[i]))


def test_a_token_uses_as_many_heads_as_it_may_and_tokens_differ():
    module = module_of("mixture-of-heads:active=0.5,shared=1", heads=8)
    used = module.gates(texts(40)) > 0
    assert used[..., 0].all()
    assert (used.sum(-1) == 4).all()
    assert len({tuple(row) for row in used.flatten(0, 1).tolist()}) > 3


def test_the_balance_loss_is_least_where_heads_are_used_alike():
    module = module_of("mixture-of-heads:active=0.5,shared=1,balance=1").train()
    with torch.no_grad():
        module.route.weight.zero_()
        module.route.weight[:, :3] = 4 * torch.eye(3)
        alike, one = (torch.zeros(1, 3, 32, dtype=torch.double) for _ in range(2))
        alike[0, :, :3] = torch.eye(3)
        one[0, :, 0] = 1
    module(alike)
    assert float(module.extra_loss.detach()) == pytest.approx(1.0)  # 3 heads, f = P = 1 / 3
    module(one)
    p = math.exp(4) / (math.exp(4) + 2)
    assert float(module.extra_loss.detach()) == pytest.approx(3 * p)
    module.eval()(one)
    assert module.extra_loss is None
    silent = module_of("mixture-of-heads:balance=0").train()
    silent(alike)
    assert silent.extra_loss is None


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="above 0, 1 at most"):
        MIXERS.parse("mixture-of-heads:active=1.5")
    with pytest.raises(FoveateError, match="must be 0 or more"):
        MIXERS.parse("mixture-of-heads:shared=-1")
    with pytest.raises(FoveateError, match="leaves none to choose beside 2 shared"):
        module_of("mixture-of-heads:active=0.5,shared=2")
    with pytest.raises(FoveateError, match="heads of an even size, not 1"):
        module_of(heads=32)


class Small(MixtureOfHeadsBeatsAllHeads):
    steps, seeds, sizes, task = 2, (0,), Sizes(width=32, heads=8, layers=1), "lm:length=16"


def test_the_claim_runs():
    claim = Small()
    finding = claim.run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["with all heads in use and indifferent routers it is multi-head attention"]


def test_heads_that_are_off_stay_off_in_the_control():
    from foveate.train.loop import Settings

    learned = Small().fixed(0.5, Settings(steps=1, batch=4), torch.device("cpu"))
    module = learned.model.layers[0].mixer
    before = module.out.weight.clone()
    x = texts()[0:1].float()
    with torch.no_grad():
        y, _ = module(x)
        module.out.weight[:, 16:] += 1
        same, _ = module(x)
        module.out.weight.copy_(before)
        module.out.weight[:, :16] += 1
        other, _ = module(x)
    assert torch.equal(y, same)
    assert not torch.allclose(y, other)
