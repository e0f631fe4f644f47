"""Knockout: a planted mover head is found at its layer, and nothing where nothing flows."""

from __future__ import annotations

import functools

import pytest
import torch

import foveate as fv
from foveate.data.facts import Fact, prompt_of
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.models.planted import Planted
from foveate.probes import Data, knockout
from foveate.probes.knockout import KINDS, FactsFlowInStages, Knockout, dropped, edges
from foveate.tasks.base import Bench

FACTS = tuple(Fact("mark", subject, "ab{}cd ", answer) for subject, answer in ("FP", "GQ", "HR", "IS"))


@functools.cache
def knowing(over_relation=False):
    """Layer 0 knows what belongs to a subject; a head of layer 2 takes it to the end, or one of 1 and one of 3."""
    circuit = Planted(layers=4)
    for fact in FACTS:
        key, value = fv.tiny_tokenizer()(fact.subject + fact.answer).input_ids
        circuit.neuron(0, when={"token": key}, write={"spare": value})
    here = ("position", "position")
    if not over_relation:
        return circuit.head(2, 1, match=here, shift=-3, move=("spare", "out")).model()
    circuit.head(1, 0, match=here, shift=-1, move=("spare", "previous"))  # from the subject to the token after it
    return circuit.head(3, 2, match=here, shift=-2, move=("previous", "out")).model()


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(knockout, "FACTS", FACTS)


def data(model):
    return Data.of(model, fv.tiny_tokenizer(), length=64, passages=2)


def drops(model):
    prompts = [prompt_of(fact, fv.tiny_tokenizer()) for fact in FACTS]
    return dict(zip(KINDS, dropped(model, prompts).nanmean(0), strict=True))


def test_the_layer_that_takes_the_subject_to_the_end_is_found(few):
    model = knowing()
    reading = Knockout().measure(model, data(model))
    assert reading.of_role("takes the subject to the end") == [(2, 0)]
    expected = torch.tensor([0.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(reading.scores["knockout"].scores[:, 0], expected, atol=0.05, rtol=0)


def test_only_the_edge_that_is_used_matters():
    found = drops(knowing())
    for kind in KINDS[1:]:
        assert found[kind].abs().max() < 0.05, kind


def test_a_fact_that_flows_over_the_relation_does_so_in_two_stages(few):
    found = drops(knowing(over_relation=True))
    assert (found["subject to relation"] > 0.5).nonzero().flatten().tolist() == [1]
    assert (found["relation to last"] > 0.5).nonzero().flatten().tolist() == [3]
    assert found["subject to last"].max() < 0.05
    finding = FactsFlowInStages().run(Bench(knowing(over_relation=True), fv.tiny_tokenizer(), load_text("prose")))
    assert finding.checks["relation to last is later than subject to relation"]
    assert not finding.checks["subject to last carries half of the answer or more"]


@pytest.mark.parametrize("template", ["ab{}cd", "{}bcd", "abc{}"])
def test_edges_look_back_and_random_ones_are_others(template):
    prompt = prompt_of(Fact("mark", "FG", template, "P"), fv.tiny_tokenizer())
    generator = torch.Generator().manual_seed(0)
    made = {kind: edges(prompt, kind, generator) for kind in KINDS}
    assert all(not m.triu(1).any() for m in made.values())
    assert not (made["random edges"] & made["subject to last"]).any() and not made["random edges"][:, 0].any()
    assert made["random edges"].sum() <= 2 and made["last to itself"].sum() == 1


def test_bad_input_is_told():
    model = fv.tiny("llama")
    with pytest.raises(FoveateError, match="at least 1 fact"):
        Knockout(facts=0).check(model, data(model))
