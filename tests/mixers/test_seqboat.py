"""SeqBoat: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, Shape
from foveate.backbone.parts import rotated
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.seqboat import SeqBoatAttendsWhereNeeded
from foveate.tasks.base import Bench
from foveate.train.build import Sizes


def module_of(text="seqboat:window=3"):
    module = MIXERS.parse(text).build(Shape(32, 4)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if module.select:  # some tokens are to be active and some not
            module.router.weight.normal_()
            module.router.bias.zero_()
    return module


def silu(x):
    return x * x.sigmoid()


def by_hand(module, x):
    """One text, token by token, with a list of the tokens that were active."""
    average = module.average
    alpha, delta = average.alpha.sigmoid(), average.delta.sigmoid()
    held, past, rows, active = torch.zeros_like(alpha), [], [], []
    for t, token in enumerate(x):
        held = alpha * average.beta * token[:, None] + (1 - alpha * delta) * held
        m = silu((average.eta * held).sum(-1) + average.skip * token)
        seen = m.new_zeros(module.values)
        p = (module.router(m) / module.log_temperature.exp()).softmax(-1) if module.select else m.new_tensor([0, 1])
        active.append(bool(p[1] > p[0]))
        if active[-1]:
            z, r, v = silu(module.zrv(m)).split([module.features, module.values, module.values])
            q, k = (rotated((z * module.scale[i] + module.shift[i])[None, None, None], t)[0, 0, 0] for i in range(2))
            past = [*past, (k, v)][-module.window :]
            weights = torch.stack([q @ k / math.sqrt(module.features) for k, _ in past]).softmax(0)
            seen = p[1] * r * sum(w * v for w, (_, v) in zip(weights, past, strict=True))
        rows.append(module.out(torch.cat([m, seen])))
    return torch.stack(rows), active


@pytest.mark.parametrize("text", ["seqboat:window=3", "seqboat:window=1", "seqboat:window=4,select=false,expand=2"])
def test_it_is_its_equations_and_texts_of_a_batch_route_apart(text):
    module, x = module_of(text), torch.randn(3, 25, 32, dtype=torch.double)
    y, _ = module(x)
    active = module.active
    stepped, state = [], module.start(3, x)
    for piece in x.split([10, 1, 1, 13], 1):
        rows, state = module(piece, state)
        stepped.append(rows)
    for i in range(3):
        slow, chosen = by_hand(module, x[i])
        torch.testing.assert_close(y[i], slow)
        torch.testing.assert_close(torch.cat(stepped, 1)[i], slow)
        assert active[i].tolist() == chosen
    if module.select:
        assert 0.1 < module_rate(module, x) < 0.9 and len({int(row.sum()) for row in active}) > 1


def module_rate(module, x):
    module(x)
    assert float(module.rate) == pytest.approx(float(module.active.float().mean()))
    return float(module.rate)


def test_only_active_tokens_are_worked_on():
    module, x = module_of(), torch.randn(2, 40, 32, dtype=torch.double)
    sizes = []
    module.zrv.register_forward_hook(lambda module, given, got: sizes.append(given[0].shape[1]))
    module(x)
    assert sizes == [int(module.active.sum(1).max())] and sizes[0] < 40
    with torch.no_grad():
        module.router.bias += torch.tensor([1e3, 0])
    y, _ = module(x)
    assert float(module.rate) == 0 and sizes[1] == 1  # a row that nobody reads
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_window_counts_active_tokens_not_tokens():
    """A token that is not active costs no room: the same active tokens with more noise between see the same."""
    module = module_of("seqboat:window=2")
    x = torch.randn(1, 30, 32, dtype=torch.double, requires_grad=True)
    y, _ = module(x)
    places = module.active[0].nonzero().flatten().tolist()
    with torch.no_grad():
        module.average.alpha.fill_(40.0)  # without an average, tokens meet in attention alone
        module.average.delta.fill_(40.0)
    y, _ = module(x)
    places = module.active[0].nonzero().flatten().tolist()
    gap = next(i for i in range(2, len(places)) if places[i] - places[i - 1] > 1)
    (gradient,) = torch.autograd.grad(y[0, places[gap]].sum(), x)
    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == [places[gap - 1], places[gap]]


def test_the_router_learns_through_its_confidence_alone():
    module, x = module_of(), torch.randn(2, 20, 32, dtype=torch.double)
    module(x)[0].square().sum().backward()
    assert module.router.weight.grad.abs().max() > 0
    assert module.log_temperature.grad.abs() > 0


def test_all_tokens_are_active_at_first():
    module = MIXERS.parse("seqboat").build(Shape(32, 4))
    module(torch.randn(2, 50, 32))
    assert float(module.rate) == 1


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="must be 1 or more"):
        MIXERS.parse("seqboat:window=0")
    with pytest.raises(FoveateError, match="an even number"):
        MIXERS.parse("seqboat:features=7")


class Small(SeqBoatAttendsWhereNeeded):
    steps, batch, seeds, sizes, task = 2, 4, (0,), Sizes(width=32, layers=1), "mqar:pairs=2,length=16"


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
