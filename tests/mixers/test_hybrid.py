"""Hybrid stacks: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, BackboneConfig, BackboneForCausalLM, Shape, state_bytes
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.hybrid import HybridRecalls, attention_layers
from foveate.mixers.mamba2 import Mamba2Mixer
from foveate.mixers.softmax import SoftmaxMixer
from foveate.tasks.base import Bench
from foveate.train.build import Sizes


def test_attention_is_spread_evenly_and_never_first():
    assert attention_layers(28, 0.14) == [5, 11, 17, 23]
    for layers in range(2, 40):
        for share in (0.05, 0.14, 0.3, 0.5):
            chosen = attention_layers(layers, share)
            assert len(chosen) == len(set(chosen)) == max(1, round(share * layers))
            assert chosen[0] > 0 and chosen[-1] < layers
            runs = [b - a - 1 for a, b in zip([-1, *chosen], [*chosen, layers], strict=True)]
            assert max(runs) - min(runs) <= 1
    assert len(attention_layers(4, 0.99)) == 3  # one layer keeps a state
    assert attention_layers(1, 0.5) == [0]


def test_layers_are_what_they_would_be_alone():
    spec = MIXERS.parse("hybrid:state=mamba2(state=8),attention=softmax(window=4),share=0.3")
    kinds = [type(spec.build(Shape(32, 4, layer, 6))) for layer in range(6)]
    assert [kind is SoftmaxMixer for kind in kinds] == [False, False, True, False, True, False]
    torch.manual_seed(0)
    ours = spec.build(Shape(32, 4, 0, 6))
    torch.manual_seed(0)
    alone = MIXERS.parse("mamba2:state=8").build(Shape(32, 4, 0, 6))
    x = torch.randn(1, 9, 32)
    assert isinstance(ours, Mamba2Mixer) and torch.equal(ours(x)[0], alone(x)[0])
    assert spec.build(Shape(32, 4, 2, 6)).window == 4


def test_its_text_reads_back():
    text = "hybrid:state=linear,attention=softmax(kv_heads=2,window=64),share=0.25"
    assert MIXERS.parse(text).to_text() == text
    assert MIXERS.parse("hybrid").to_text() == "hybrid"


def test_only_attention_grows():
    model = BackboneForCausalLM(BackboneConfig(vocab_size=20, num_hidden_layers=4, mixer="hybrid"))
    held = {}
    for n in (10, 30):
        state = model(torch.ones(1, n, dtype=torch.long), use_cache=True).past_key_values.text.state
        held[n] = [state_bytes(state[str(layer)]) for layer in range(4)]
    assert [a != b for a, b in zip(held[10], held[30], strict=True)] == [False, False, True, False]


@pytest.mark.parametrize("share", [0, 1])
def test_bad_settings_get_a_sentence(share):
    with pytest.raises(FoveateError, match="share must be between 0 and 1"):
        MIXERS.parse(f"hybrid:share={share}")


class Small(HybridRecalls):
    steps, text_steps, batch, seeds, sizes, held = 2, 2, 4, (0,), Sizes(width=32, layers=3), 600
    recall, text = "mqar:pairs=2,length=8", "lm:length=8"


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["the hybrid holds less than half of what attention holds"]
