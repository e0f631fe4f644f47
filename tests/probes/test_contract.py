"""What holds for every probe: it only looks, tells nothing of noise, and its reading is data."""

from __future__ import annotations

import json

import pytest
import torch

import foveate as fv
from foveate.methods import techniques
from foveate.models.anatomy import anatomy
from foveate.probes import Data
from foveate.probes.base import PROBES, Reading

IDS = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def read():
    """The reading of a probe on random weights of a family, made once."""
    made: dict[tuple[str, str], tuple[object, Reading]] = {}

    def of(name: str, family: str = "llama"):
        if (name, family) not in made:
            model = fv.tiny(family)
            probe = PROBES.build(name, {})
            data = Data.of(model, fv.tiny_tokenizer(), length=64, passages=2)
            probe.check(model, data)
            made[name, family] = model, probe.measure(model, data)
        return made[name, family]

    return of


@pytest.mark.parametrize("name", PROBES.all())
def test_on_random_weights_no_unit_has_a_role(name, read):
    assert read(name)[1].roles == []


@pytest.mark.parametrize("name", PROBES.all())
def test_the_model_is_as_it_was(name, read):
    model = read(name)[0]
    fresh = fv.tiny("llama")
    assert torch.equal(model(IDS).logits, fresh(IDS).logits)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == fresh.config._attn_implementation and not model.training


@pytest.mark.parametrize("name", PROBES.all())
def test_its_reading_goes_through_json_and_shows_itself(name, read):
    reading = read(name)[1]
    assert reading.probe == name and reading.summary.endswith(".") and reading.title
    again = Reading.from_json(json.loads(json.dumps(reading.to_json(), allow_nan=False)))
    assert again.to_json() == reading.to_json()
    assert len(reading.to_frame()) == sum(s.scores.numel() for s in reading.scores.values())
    assert "<script" not in reading._repr_html_()


@pytest.mark.parametrize("name", PROBES.all())
def test_its_scores_have_a_row_for_every_layer(name, read):
    layers = len(anatomy(fv.tiny("llama")).layers)
    for scores in read(name)[1].scores.values():
        assert scores.scores.shape[0] == layers and scores.scores.dim() == 2


@pytest.mark.parametrize("name", PROBES.all())
def test_it_says_what_it_costs_and_what_it_asks(name):
    probe, model = PROBES.build(name, {}), fv.tiny("llama")
    assert probe.cost(model, Data.of(model, fv.tiny_tokenizer(), length=64, passages=2)) >= 0
    assert probe.title and probe.claim and probe.role == "probe"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "phi3", "opt"])
@pytest.mark.parametrize("name", [name for name, cls in PROBES.all().items() if cls.default])
def test_it_reads_other_families(name, family, read):
    assert read(name, family)[1].summary


def test_no_two_techniques_share_a_name():
    import foveate.methods as methods

    known = [*methods.METHODS.all(), *methods.FUNCTIONS, *(n for registry in methods.PARTS for n in registry.all())]
    assert len(known) == len(set(known)) == len(techniques())
