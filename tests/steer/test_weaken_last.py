"""Weaken last: exactly a fraction of what the last layer adds is taken away; a planted suppressor gives way."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
import foveate.steer.weaken_last as module
from foveate.data.facts import Fact, Prompt
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.models.patching import Site, patched, recorded
from foveate.models.planted import Planted
from foveate.models.tiny import TINY_FAMILIES
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

IDS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
ENDS = [Site("residual", 3), Site("residual", 4)]


@torch.no_grad()
def stream(model, recipe=None):
    """The residual stream before and after the last layer."""
    with recorded(model, ENDS) as values:
        if recipe is None:
            model(IDS)
        else:
            with apply(model, recipe):
                model(IDS)
    return [values[site].double() for site in ENDS]


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_fraction_of_what_the_layer_adds_is_gone(family, strength):
    model = fv.tiny(family)
    before, after = stream(model)
    weak_before, weak_after = stream(model, f"weaken-last:strength={strength}")
    torch.testing.assert_close(weak_before, before)
    torch.testing.assert_close(weak_after, before + (1 - strength) * (after - before), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_attention_and_mlp_are_all_that_the_layer_adds(family):
    model = fv.tiny(family)
    before, after = stream(model)
    gone = [after - stream(model, f"weaken-last:strength=1,part={part}")[1] for part in ("attention", "mlp")]
    torch.testing.assert_close(gone[0] + gone[1], after - before, atol=1e-4, rtol=1e-4)
    assert min(part.norm() for part in gone) > 0.01 * (after - before).norm()


def test_a_norm_after_the_sublayer_has_the_last_word():
    model = fv.tiny("gemma2")
    layer = model.model.layers[-1]
    noted = []
    hook = layer.post_feedforward_layernorm.register_forward_hook(lambda module, args, out: noted.append(out))
    _, after = stream(model)
    hook.remove()
    _, weaker = stream(model, "weaken-last:strength=0.5,part=mlp")
    torch.testing.assert_close(after - weaker, 0.5 * noted[0].double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["layer", "attention", "mlp"])
def test_a_planted_suppressor_gives_way(part):
    model = (
        Planted(layers=2)
        .neuron(0, when={"token": 70}, write={"out": 80}, strength=0.3)
        .neuron(1, when={"token": 70}, write={"out": 80}, strength=-0.2)  # takes most of it back
        .model()
    )
    ids = torch.tensor([[5, 70]])

    def answer():
        with torch.no_grad():
            return float(model(ids).logits[0, -1].softmax(-1)[80])

    suppressed = answer()
    with apply(model, f"weaken-last:strength=1,part={part}"):
        free = answer()
    if part == "attention":
        assert free == pytest.approx(suppressed)
    else:
        assert free > 0.8 > 0.5 > suppressed


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_single_heads_say_less(family):
    model = fv.tiny(family)
    sites = [Site("head", 3, 1), Site("head", 3, 2)]
    with torch.no_grad(), patched(model, {site: lambda old: 0.25 * old for site in sites}):
        expected = model(IDS).logits
    with torch.no_grad(), apply(model, "weaken-last:strength=0.75,heads=1/2"):
        torch.testing.assert_close(model(IDS).logits, expected)
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-3)


def test_the_claim_finds_a_planted_suppressor(monkeypatch):
    facts, circuit = [], Planted(layers=4)
    for i in range(8):
        circuit.neuron(0, when={"token": 10 + i}, write={"out": 40 + i}, strength=0.3)
        circuit.neuron(3, when={"token": 10 + i}, write={"out": 40 + i}, strength=-0.2)
        facts.append(Prompt(Fact("any", f"{i}", "{}", "x"), torch.tensor([[5, 10 + i]]), 1, 2, 40 + i))
    monkeypatch.setattr(module, "known_facts", lambda *given, **settings: facts)
    monkeypatch.setattr(module, "PROSE", Perplexity(tokens=64, chunk=32))
    finding = module.WeakerLastLayerRecalls().run(Bench(circuit.model(), fv.tiny_tokenizer(), load_text("prose")))
    assert all(finding.checks.values())
    assert any("strength=1.0" in name for name in finding.metrics)


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="fraction that is taken away"):
        Recipe.of("weaken-last:strength=2")
    with pytest.raises(FoveateError, match="not one of layer, attention, mlp"):
        Recipe.of("weaken-last:part=heads")
    with pytest.raises(FoveateError, match="such as 1/4"):
        Recipe.of("weaken-last:heads=a/4")
    with pytest.raises(FoveateError, match="heads 0 to 3"), apply(fv.tiny("llama"), "weaken-last:heads=7"):
        pass
