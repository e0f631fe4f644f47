"""Temp-scale: weights are the softmax of the logits over the temperature, in every layer and head."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.steer.temp_scale import SharperAttentionKeepsApart, TempScale, _alike, _final
from foveate.tasks.base import Bench

IDS = torch.randint(3, 120, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.25, 3.0])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_it_is_the_model_with_its_logits_divided(family, temperature):
    model, other = fv.tiny(family).double(), fv.tiny(family).double()
    for layer in fv.anatomy(other).layers:
        layer.attention.scaling = layer.attention.scaling / temperature
    with fv.apply(model, f"temp-scale:temperature={temperature}"), torch.no_grad():
        ours = model(IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(ours, other(IDS).logits, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(ours, model(IDS).logits, atol=1e-3)


def test_a_temperature_of_one_changes_nothing_at_all():
    model = fv.tiny("llama")
    with fv.apply(model, "temp-scale:temperature=1"):
        ours = model(IDS).logits
        assert all(not layer.attention._forward_hooks for layer in fv.anatomy(model).layers)
    assert torch.equal(ours, model(IDS).logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_none_gets_a_sentence(temperature):
    with pytest.raises(FoveateError, match="positive number"):
        TempScale(temperature=temperature)


def test_likeness_is_the_mean_cosine_to_the_others():
    vectors = torch.tensor([[1.0, 0], [0, 2], [3, 3]])
    half = 0.5**0.5
    expected = torch.tensor([half / 2, half / 2, half]).double()
    torch.testing.assert_close(_alike(vectors), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_what_the_claim_takes_as_states_is_what_the_output_map_gets(family):
    model = fv.tiny(family)
    with _final(model) as final, torch.no_grad():
        logits = model(IDS).logits
    torch.testing.assert_close(model.get_output_embeddings()(final[-1]), logits)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_the_claim_runs(monkeypatch):
    monkeypatch.setattr(SharperAttentionKeepsApart, "passages", 3)
    monkeypatch.setattr(SharperAttentionKeepsApart, "lengths", (8, 32))
    finding = SharperAttentionKeepsApart().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert len(finding.checks) == 5 and finding.metrics["cosine of texts of 8 tokens, at temperature 0.8"].value
