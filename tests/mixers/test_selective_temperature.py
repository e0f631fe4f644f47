"""Selective attention temperatures: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch
from torch.nn import functional

import foveate as fv
from foveate.backbone import MIXERS, Shape
from foveate.backbone.parts import rotated
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.selective_temperature import TemperaturesHelp, entropies
from foveate.tasks.base import Bench
from foveate.train import Sizes, build
from foveate.train.tasks import TRAIN_TASKS


def module_of(text="selective-temperature", away=True, seed=0):
    torch.manual_seed(seed)
    module = MIXERS.parse(text).build(Shape(32, 4)).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if away and "weight" not in name:
                parameter.add_(torch.randn_like(parameter))
    return module


def text(n=9):
    return torch.randn(2, n, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("on", ["qv", "q", "v"])
def test_the_equations_token_by_token(on):
    module, x = module_of(f"selective-temperature:on={on}"), text()
    q, k, v = module.qkv(x).view(2, 9, 3, 4, 8).unbind(2)
    q, v = q.clone(), v.clone()
    for h in range(4):
        for i in range(9):
            if "q" in on:
                token = torch.tanh(functional.gelu(q[:, i, h]) @ module.query_vectors[h])
                factor = token + 1 + torch.exp(-torch.exp(module.growth[h])) * math.log(i + 1)
                q[:, i, h] = q[:, i, h] * factor[:, None]
            if "v" in on:
                factor = torch.tanh(functional.gelu(v[:, i, h]) @ module.value_vectors[h]) + 1
                v[:, i, h] = v[:, i, h] * factor[:, None]
    q, k = rotated(q), rotated(k)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8)
    shares = logits.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    y = torch.einsum("bhij,bjhd->bihd", shares, v).flatten(2)
    torch.testing.assert_close(module(x)[0], module.out(y))


def test_it_starts_as_plain_attention_nearly():
    ours, theirs = module_of(away=False), MIXERS.parse("softmax").build(Shape(32, 4)).double()
    theirs.load_state_dict({name: w for name, w in ours.state_dict().items() if "weight" in name})
    torch.testing.assert_close(ours(text())[0], theirs(text())[0], atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        ours.growth.fill_(100.0)  # no term of the position at all
    torch.testing.assert_close(ours(text())[0], theirs(text())[0])


def test_weights_are_shared():
    names = {name: p.numel() for name, p in module_of().named_parameters() if "weight" not in name}
    assert names == {"query_vectors": 32, "value_vectors": 32, "growth": 4}
    assert "query_vectors" not in dict(module_of("selective-temperature:on=v").named_parameters())


def test_entropies_of_uniform_attention_are_those_of_the_count():
    model = build(TRAIN_TASKS.parse("lm"), Sizes(width=32, mixer="selective-temperature"))
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.qkv.weight[:32] = 0
    ids = torch.randint(0, 256, (2, 7))
    torch.testing.assert_close(entropies(model, ids), torch.arange(1, 8).float().log(), atol=1e-5, rtol=1e-5)


def test_sharper_queries_have_less_entropy():
    ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    model = build(TRAIN_TASKS.parse("lm"), Sizes(width=32, mixer="selective-temperature", layers=1))
    before = entropies(model, ids)
    with torch.no_grad():
        model.layers[0].mixer.growth.fill_(-3.0)  # s = 0.95
    after = entropies(model, ids)
    torch.testing.assert_close(after[0], before[0])  # log 1 is 0
    assert (after[5:] < before[5:]).all()


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="no factors on 'k': give qv, q or v"):
        MIXERS.parse("selective-temperature:on=k")
    with pytest.raises(FoveateError, match="heads of an even size, not 1"):
        MIXERS.parse("selective-temperature").build(Shape(8, 8))


class Small(TemperaturesHelp):
    steps, seeds, length, recall = 2, (0,), 32, "mqar:pairs=1,length=8,vocab=8"


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["it has under 0.5% more weights"]
