"""Multi-head latent attention: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, Shape, state_bytes
from foveate.backbone.parts import rotated
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.mla import LatentsBeatHeads
from foveate.tasks.base import Bench


def module_of(text="mla", seed=0):
    torch.manual_seed(seed)
    module = MIXERS.parse(text).build(Shape(32, 4)).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def text(n=9):
    return torch.randn(2, n, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def normed(norm, x):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


@pytest.mark.parametrize("spec, latent, r", [("mla", 32, 4), ("mla:latent=10,rotary=6,query_latent=12", 10, 6)])
def test_the_equations_head_by_head(spec, latent, r):
    module, x = module_of(spec), text()
    compressed = x @ module.down.weight.T
    c, key = normed(module.norm, compressed[..., :latent]), compressed[..., latent:]
    key = rotated(key[:, :, None])[:, :, 0]
    z = x if module.query_down is None else normed(module.query_norm, x @ module.query_down.weight.T)
    heads = []
    for i in range(4):
        up_k, up_v = module.up.weight[16 * i : 16 * i + 8], module.up.weight[16 * i + 8 : 16 * i + 16]
        rows = module.query_up.weight[(8 + r) * i : (8 + r) * (i + 1)]
        q, turned = z @ rows[:8].T, rotated((z @ rows[8:].T)[:, :, None])[:, :, 0]
        logits = (q @ (c @ up_k.T).mT + turned @ key.mT) / math.sqrt(8 + r)
        shares = logits.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf).softmax(-1)
        heads.append(shares @ (c @ up_v.T))
    torch.testing.assert_close(module(x)[0], module.out(torch.cat(heads, -1)))


def test_absorbed_is_expanded():
    module, x = module_of(), text()
    whole, state = module(x)[0], module.start(2, x)
    for i in range(9):
        y, state = module(x[:, i : i + 1], state)  # single tokens go the absorbed way
        torch.testing.assert_close(y[:, 0], whole[:, i])


def test_many_queries_can_go_the_absorbed_way_too():
    module = module_of()
    q, turned = torch.randn(2, 5, 4, 8).double(), torch.randn(2, 5, 4, 4).double()
    c, key = torch.randn(2, 12, 32).double(), torch.randn(2, 12, 4).double()
    torch.testing.assert_close(module.absorbed(q, turned, c, key), module.expanded(q, turned, c, key))


def test_a_text_holds_the_latent_and_the_rotary_key_alone():
    module = module_of("mla:latent=10,rotary=6")
    _, state = module(text(), module.start(2, text()))
    assert {name: tuple(each.shape) for name, each in state.items()} == {
        "latents": (2, 9, 10),
        "rotary": (2, 9, 6),
        "seen": (2,),
    }
    assert state_bytes(state) == 2 * 9 * 16 * 8 + 2 * 8


@pytest.mark.parametrize("heads, rotary", [(4, 4), (8, 2), (32, 2), (2, 8)])
def test_the_rotary_key_is_half_a_head_and_even(heads, rotary):
    assert MIXERS.parse("mla").build(Shape(32, heads)).rotary == rotary


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="must be 0 or more"):
        MIXERS.parse("mla:latent=-1")
    with pytest.raises(FoveateError, match="an even number for rotary"):
        MIXERS.parse("mla:rotary=3")


class Small(LatentsBeatHeads):
    steps, seeds, task = 2, (0,), "lm:length=16"


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert all(held for said, held in finding.checks.items() if "is better" not in said)
