"""Mamba: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, Shape
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.mamba import MambaSelects
from foveate.tasks.base import Bench
from foveate.train.build import Sizes


def by_hand(module, x):
    """The block from its equations, token by token, in plain loops over tokens."""
    inner = module.skip.shape[0]
    u, gate = module.inner_gate(x).split(inner, -1)
    weight, size = module.conv.weight[:, 0], module.conv.size
    padded = torch.cat([x.new_zeros(x.shape[0], size - 1, inner), u], 1)
    u = sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(size))
    u = u * u.sigmoid()
    state, rows = x.new_zeros(x.shape[0], inner, module.states), []
    for t in range(x.shape[1]):
        if module.selective:
            made = module.chosen(u[:, t])
            step = module.step(made[:, : module.rank]) + module.step_bias
            b, c = (made[:, module.rank + i * module.states :][:, None, : module.states] for i in (0, 1))
        else:
            step, b, c = module.step_bias, module.b, module.c
        step = (1 + step.exp()).log().expand_as(u[:, t]).unsqueeze(-1)
        state = torch.exp(-step * module.log_rates.exp()) * state + step * b * u[:, t].unsqueeze(-1)
        rows.append((c * state).sum(-1) + module.skip * u[:, t])
    return module.out(torch.stack(rows, 1) * gate * gate.sigmoid())


@pytest.mark.parametrize("text", ["mamba", "mamba:selective=false", "mamba:state=3,expand=1.5,conv=2,rank=5"])
def test_the_block_is_its_equations(text):
    module = MIXERS.parse(text).build(Shape(32, 4)).double()
    x = torch.randn(2, 21, 32, dtype=torch.double)
    torch.testing.assert_close(module(x)[0], by_hand(module, x))


def test_it_starts_as_the_paper_has_it():
    module = MIXERS.parse("mamba").build(Shape(64, 4))
    torch.testing.assert_close(module.log_rates.exp(), torch.arange(1.0, 17).repeat(128, 1))
    steps = torch.nn.functional.softplus(module.step_bias)
    assert steps.min() > 9e-4 and steps.max() < 0.101
    assert module.rank == 4


def test_without_selection_it_is_the_same_filter_at_all_times():
    module = MIXERS.parse("mamba:selective=false").build(Shape(32, 4)).double()
    x = torch.zeros(1, 30, 32, dtype=torch.double)
    inner = module.skip.shape[0]
    module.inner_gate.weight.data[inner:] = 0  # the gate would let nothing through: only the memory is looked at
    x[:, 3] = torch.randn(32)
    late = x.roll(7, 1)
    states = [module(each, module.start(1, x))[1]["memory"] for each in (x[:, :20], late[:, :27])]
    torch.testing.assert_close(*states)
    chosen = MIXERS.parse("mamba").build(Shape(32, 4)).double()
    noisy = x + torch.randn(1, 30, 32, dtype=torch.double)
    kept = chosen.start(1, x)["memory"] + 1  # what stays of a memory depends on what is read
    after = [chosen(each[:, :9], {**chosen.start(1, x), "memory": kept})[1]["memory"] for each in (x, noisy)]
    assert not torch.allclose(*after, atol=1e-3)


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="state and conv must be 1 or more"):
        MIXERS.parse("mamba:state=0")


class Small(MambaSelects):
    steps, batch, seeds, sizes = 2, 4, (0,), Sizes(width=32, layers=1, channel="no-channel")
    copying, induction, longer = "selective-copying:items=2,length=8", "induction:length=8", "induction:length=32"


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["the scan is the recurrence"] and finding.checks["the state does not grow with the text"]
