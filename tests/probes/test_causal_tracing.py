"""Causal tracing: a planted fact is traced to its layer and place; edits change it and undo themselves."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.data.facts import Fact, prompt_of
from foveate.errors import FoveateError
from foveate.models.patching import Site, at, patched, recorded
from foveate.models.planted import Planted
from foveate.probes import Data, causal_tracing
from foveate.probes.causal_tracing import CausalTracing, _explained, traced
from foveate.probes.editing import chances, covariances, edited, keys_of, values_for

FACTS = tuple(Fact("mark", subject, "ab{}cd ", answer) for subject, answer in ("FP", "GQ", "HR"))


@functools.cache
def knowing(recalls=1, moves=3):
    """The MLP of one layer knows what belongs to a subject, and the head 1 of a later one takes it to the end."""
    circuit = Planted(layers=4)
    for subject, answer in ("FP", "GQ", "HR"):
        key, value = fv.tiny_tokenizer()(subject + answer).input_ids
        circuit.neuron(recalls, when={"token": key}, write={"spare": value}, strength=6)
    # The subject stands four tokens before the last one.
    return circuit.head(
        moves, 1, match=("position", "position"), shift=-3, move=("spare", "out"), sharp=80
    ).model()  # loud: noise takes neither away


def data(model):
    return Data.of(model, fv.tiny_tokenizer(), length=64, passages=2)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(causal_tracing, "FACTS", FACTS)


def test_a_fact_is_traced_to_its_layer_and_place(few):
    model = knowing()
    reading = CausalTracing(draws=8).measure(model, data(model))
    assert [(role.kind, role.layer) for role in reading.roles] == [("layer", 1)]
    there = reading.scores["tracing"].scores[:, 0]
    assert (there[:3] > 0.9).all() and (there[3:] < 0.1).all()  # until it is taken to the end
    late = [y for _, y in reading.panels[0].series["last token"]]
    assert max(late[:3]) < 0.1 and min(late[3:]) > 0.9
    assert max(y for _, y in reading.panels[0].series["after the subject"]) < 0.1
    assert "from layer 3 on" in reading.summary


def test_effects_are_those_of_patching_one_by_one():
    model, prompt = fv.tiny("gpt2").double(), prompt_of(FACTS[0], fv.tiny_tokenizer())
    trace = traced(model, [prompt], draws=1, layers=[2], where=(1,), noise=3.0)
    answer, start, after = torch.tensor([prompt.answer]), Site("residual", 0), Site("residual", 3)
    with torch.no_grad(), recorded(model, [start, after]) as values:
        model(prompt.ids, use_cache=False)
    scale = 3 * values[start][:, prompt.start : prompt.end].float().std()
    noise = scale * torch.randn(1, 1, model.config.n_embd, generator=torch.Generator().manual_seed(0))
    changed = values[start].clone()
    changed[:, prompt.start : prompt.end] += noise
    with patched(model, {start: changed}):
        noised = chances(model, prompt.ids, answer)
    with patched(model, {start: changed, after: at([prompt.end - 1], values[after])}):
        back = chances(model, prompt.ids, answer)
    torch.testing.assert_close(trace.clean, chances(model, prompt.ids, answer))
    torch.testing.assert_close(trace.noised, noised)
    torch.testing.assert_close(trace.effects[0, 1], back - noised)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_edit_answers_the_key_with_the_value_and_undoes_itself(family):
    model, prompt = fv.tiny(family), prompt_of(FACTS[0], fv.tiny_tokenizer())
    known = covariances(model, torch.randint(3, 250, (2, 200)), [1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    key, value = keys_of(model, [prompt], 1)[0], values_for(model, [prompt], [65], 1)[0]
    site, goal = Site("mlp", 1), torch.tensor([65])
    was = chances(model, prompt.ids, goal)
    with edited(model, 1, key, value, known[1]), recorded(model, [site]) as said:
        now = chances(model, prompt.ids, goal)
    torch.testing.assert_close(said[site][0, prompt.end - 1], value, rtol=1e-3, atol=1e-4)
    assert now > was
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_an_edit_changes_one_planted_fact_and_leaves_the_others():
    model, tokenizer = knowing(), fv.tiny_tokenizer()
    prompts = [prompt_of(fact, tokenizer) for fact in FACTS]
    other = tokenizer("S").input_ids
    known = covariances(model, data(model).stream("repeat", model), [1])
    key, value = keys_of(model, prompts[:1], 1)[0], values_for(model, prompts[:1], other, 1)[0]
    with edited(model, 1, key, value, known[1]):
        assert chances(model, prompts[0].ids, torch.tensor(other)) > 0.9
        for prompt in prompts[1:]:
            assert chances(model, prompt.ids, torch.tensor([prompt.answer])) > 0.9


def test_what_tracing_adds_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    success, effects = rng.normal(size=(2, 7, 3))
    dummies = np.tile(np.eye(3), (7, 1))

    def explained(columns):
        y = success.reshape(-1)
        left = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
        return 1 - (left**2).sum() / ((y - y.mean()) ** 2).sum()

    by_layer, beyond = _explained(success, effects)
    assert by_layer == pytest.approx(explained(dummies))
    assert by_layer + beyond == pytest.approx(explained(np.column_stack([dummies, effects.reshape(-1)])))


def test_the_claim_runs_where_facts_are_known(few, monkeypatch):
    from foveate.data.text import Text
    from foveate.probes.causal_tracing import TracingDoesNotSayWhereToEdit
    from foveate.tasks.base import Bench

    monkeypatch.setattr(causal_tracing, "FACTS", (*FACTS, FACTS[0]._replace(relation="other")))
    monkeypatch.setattr(causal_tracing, "EDITS", 2)  # layers 0, which knows the facts, and 2, without a neuron
    finding = TracingDoesNotSayWhereToEdit().run(
        Bench(knowing(recalls=0), fv.tiny_tokenizer(), Text("mine", "abcdefgh " * 1000, "ijkl"))
    )
    assert len(finding.checks) == 3 and finding.metrics["rewrite score, layer 0"].value > 0.5
    assert finding.checks["edits work in the best layer"] and finding.metrics["rewrite score, layer 2"].value < 0.01


def test_bad_input_is_told():
    model = fv.tiny("llama")
    with pytest.raises(FoveateError, match="at least 1 fact"):
        CausalTracing(facts=0).check(model, data(model))
    with pytest.raises(FoveateError, match="no layer 9 to edit"):
        covariances(model, torch.ones(1, 4, dtype=torch.long), [9])
