"""Mamba-2: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, Shape
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.mamba2 import Mamba2RecallsMore
from foveate.tasks.base import Bench
from foveate.train.build import Sizes


def by_hand(module, x):
    """The block as attention under the whole mask, from its equations."""
    n, inner, states, heads = x.shape[1], module.inner, module.states, module.heads
    gate, mixed, step = module.all(x).split([inner, inner + 2 * states, heads], -1)
    weight, size = module.conv.weight[:, 0], module.conv.size
    padded = torch.cat([x.new_zeros(x.shape[0], size - 1, mixed.shape[-1]), mixed], 1)
    mixed = sum(padded[:, i : i + n] * weight[:, i] for i in range(size))
    mixed = mixed * mixed.sigmoid()
    values, b, c = mixed.split([inner, states, states], -1)
    step = (1 + (step + module.step_bias).exp()).log()
    kept = torch.exp(-module.log_rates.exp() * step)
    out = []
    for head, v in enumerate(values.chunk(heads, -1)):
        mask = torch.zeros(x.shape[0], n, n, dtype=x.dtype)
        for i in range(n):
            for j in range(i + 1):
                mask[:, i, j] = kept[:, j + 1 : i + 1, head].prod(1)
        weights = torch.einsum("bis,bjs->bij", c, b) * mask * step[:, None, :, head]
        out.append(weights @ v + module.skip[head] * v)
    y = torch.cat(out, -1) * gate * gate.sigmoid()
    y = y / (y.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight
    return module.out(y)


@pytest.mark.parametrize("text", ["mamba2", "mamba2:state=5,expand=1,conv=2"])
def test_the_block_is_attention_under_the_mask_of_its_decays(text):
    module = MIXERS.parse(text).build(Shape(32, 4)).double()
    x = torch.randn(2, 12, 32, dtype=torch.double)
    torch.testing.assert_close(module(x)[0], by_hand(module, x))


def test_a_state_of_fixed_size_holds_what_is_asked_for():
    module = MIXERS.parse("mamba2:state=24").build(Shape(32, 4))
    state = module.start(3, torch.zeros(1, dtype=torch.bfloat16))
    assert state["memory"].shape == (3, 4, 24, 16) and state["memory"].dtype == torch.float32
    assert state["last"].shape == (3, 3, 64 + 2 * 24)


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="expand above 0"):
        MIXERS.parse("mamba2:expand=0")


class Small(Mamba2RecallsMore):
    steps, batch, seeds, sizes, task = (
        2,
        4,
        (0,),
        Sizes(width=32, layers=1, channel="no-channel"),
        "mqar:pairs=2,length=8",
    )


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["the recurrence is attention under the mask"]
