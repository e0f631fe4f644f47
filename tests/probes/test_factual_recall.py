"""Factual recall: parts add up to the logits in every family, and planted recall is found where it was planted."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
import foveate.probes.factual_recall as module
from foveate.data.facts import Fact, Prompt
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.models.planted import Planted
from foveate.models.tiny import TINY_FAMILIES
from foveate.probes import Data
from foveate.probes.factual_recall import FactualRecall, attributed
from foveate.tasks.base import Bench


def made(ids, start, end, answer):
    fact = Fact("any", f"subject {ids[start:end]}", "{}", str(answer))
    return Prompt(fact, torch.tensor([ids]), start, end, answer)


DRAWN = torch.randint(3, 120, (6, 7), generator=torch.Generator().manual_seed(0)).tolist()
ANY = [made(ids, 2, 4, 50 + index) for index, ids in enumerate(DRAWN)]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_all_parts_make_the_logit(family):
    model = fv.tiny(family)
    with torch.no_grad():
        for parameter in model.parameters():  # so that norms and biases are not the usual ones
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    answers = torch.tensor([fact.answer for fact in ANY])
    found = attributed(model, ANY, answers)
    total = found.attention.sum(2) + found.mlp.sum(2) + found.embedding + found.rest
    with torch.no_grad():
        logits = torch.stack([model(fact.ids).logits[0, -1] for fact in ANY]).double()
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.atanh(logits / cap)
    torch.testing.assert_close(total, logits[:, answers] - logits.mean(1, keepdim=True), atol=1e-4, rtol=1e-4)
    if getattr(fv.anatomy(model).layers[0].o, "bias", None) is None:
        torch.testing.assert_close(found.head.sum(3), found.attention, atol=1e-4, rtol=1e-4)


def test_attention_to_the_subject_is_that_of_eager_attention():
    model = fv.tiny("llama")
    found = attributed(model, ANY[:2], torch.tensor([50, 51]))
    model.set_attn_implementation("eager")
    for row, fact in enumerate(ANY[:2]):
        with torch.no_grad():
            maps = torch.stack(model(fact.ids, output_attentions=True).attentions)[:, 0, :, -1]
        torch.testing.assert_close(found.looked[row].float(), maps[..., fact.start : fact.end].sum(-1))


@pytest.fixture
def reading(monkeypatch):
    def of(circuit, facts):
        monkeypatch.setattr(module, "known_facts", lambda *given, **settings: facts)
        model = circuit.model()
        return FactualRecall().measure(model, Data.of(model, fv.tiny_tokenizer()))

    return of


RECALLED = [made([5, 10 + i, 3], 1, 2, 40 + i) for i in range(6)]


def recalling(strength):
    """Head 0.1 moves the subject, the MLP of layer 1 knows the answer, and that of layer 2 adds `strength` to it."""
    circuit = Planted().previous(0, 1)
    for fact in RECALLED:
        subject = int(fact.ids[0, 1])
        circuit.neuron(1, when={"token": 3, "previous": subject}, write={"out": fact.answer})
        circuit.neuron(2, when={"token": 3, "previous": subject}, write={"out": fact.answer}, strength=strength)
    return circuit


def test_the_mlp_that_knows_and_the_layer_that_suppresses_are_found(reading):
    found = reading(recalling(-0.3), RECALLED)
    assert [(role.role, role.name) for role in found.roles] == [
        ("suppresses the answer", "layer 2"),
        ("adds the answer", "mlp 1"),
    ] or [(role.role, role.name) for role in found.roles] == [
        ("adds the answer", "mlp 1"),
        ("suppresses the answer", "layer 2"),
    ]
    assert found.scores["mlp"].scores[:, 0].tolist() == pytest.approx([0, 1 / 0.7, -0.3 / 0.7], abs=0.02)
    assert found.scores["answer"].scores.abs().max() < 0.02
    assert found.scores["subject"].scores[0, 1] > 0.99  # the head that moves it
    assert found.metrics["added to the right answer's logit by the last layer"].high < 0


def test_a_last_layer_that_helps_does_not_suppress(reading):
    found = reading(recalling(0.3), RECALLED)
    assert found.of_role("suppresses the answer") == [] and "raises" in found.summary


def test_a_head_that_brings_the_answer_is_found(reading):
    facts = [made([5, 10 + i, 3], 1, 2, 10 + i) for i in range(6)]
    circuit = Planted().head(1, 3, match=("position", "position"), shift=-1, move=("token", "out"))
    found = reading(circuit, facts)
    assert [(role.role, role.name) for role in found.roles] == [("adds the answer", "1.3")]
    assert "100% of its attention" in found.roles[0].words
    assert found.scores["answer"].scores[1, 3] == pytest.approx(1, abs=0.02)


def test_random_weights_add_no_answers(reading, monkeypatch):
    for seed in range(3):
        monkeypatch.setattr(module, "known_facts", lambda *given, **settings: ANY)
        model = fv.tiny("gpt2", seed=seed)
        roles = FactualRecall().measure(model, Data.of(model, fv.tiny_tokenizer())).roles
        assert [role for role in roles if role.role == "adds the answer"] == []


def test_the_claim_runs(monkeypatch):
    monkeypatch.setattr(module, "known_facts", lambda *given, **settings: RECALLED)
    finding = module.LastLayerSuppresses().run(Bench(recalling(-0.3).model(), fv.tiny_tokenizer(), load_text("prose")))
    assert finding.checks["the last layer lowers the right answer's logit on average"]


def test_too_few_facts_get_a_sentence():
    model = fv.tiny("llama")
    with pytest.raises(FoveateError, match="give 4"):
        FactualRecall(facts=2).check(model, Data.of(model, fv.tiny_tokenizer()))
