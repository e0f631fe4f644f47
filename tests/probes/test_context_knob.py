"""Context knob: a planted direction that decides between context and memory is found, and turned."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
import foveate.probes.context_knob as module
from foveate.data.facts import Fact, Prompt
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.models.patching import Site, recorded
from foveate.models.planted import Planted
from foveate.probes import Data
from foveate.probes.context_knob import FRAMES, Conflict, ContextKnob, Ends, Knob, conflicts, find_knob, knobs
from foveate.tasks.base import Bench

TOKENIZER = fv.tiny_tokenizer()
LETTERS = "abcdefghijkl"


def token_of(letter):
    return TOKENIZER(letter).input_ids[0]


def asked(letter):
    """A question with a letter for its subject; the answer is the capital letter."""
    return f"{letter} is "


def facts(answer_to):
    """Prompts "a is" and so on, in byte tokens; a frame puts a space after them."""
    made = [Fact("letter", letter, "{} is", answer_to(letter)) for letter in LETTERS]
    ids = [torch.tensor([TOKENIZER(asked(fact.subject)).input_ids]) for fact in made]
    return [Prompt(fact, row, 0, 1, token_of(fact.answer)) for fact, row in zip(made, ids, strict=True)]


FACTS = facts(str.upper)


def test_conflicts_claim_the_answer_of_another_fact():
    found = conflicts(FACTS)
    assert [case.true for case in found] == [fact.answer for fact in FACTS]
    assert sorted(case.claimed for case in found) == sorted(case.true for case in found)
    for case, letter in zip(found, LETTERS, strict=True):
        assert case.claimed != case.true and case.asked == f"{letter} is"
        assert case.wrong == f"{letter} is {TOKENIZER.decode([case.claimed])}."
    assert conflicts(FACTS[:1]) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "gpt_neox"])
def test_reading_the_last_token_alone_is_the_same_as_reading_all(family):
    model, cases = fv.tiny(family), conflicts(FACTS)[:3] + [Conflict("it", "who is it? ", "it is me.", 70, 80)]
    ends = Ends(model, TOKENIZER, cases, FRAMES["context"])
    new = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    states, leads = ends.states(), ends.leads()
    turned = ends.leads(2, lambda old, rows: new[rows])
    for row, case in enumerate(cases):
        text = TOKENIZER(FRAMES["context"].format(wrong=case.wrong, asked=case.asked), return_tensors="pt").input_ids
        with torch.no_grad(), recorded(model, [Site("residual", 2)]) as values:
            logits = model(text).logits[0, -1]
        torch.testing.assert_close(states[2, row], values[Site("residual", 2)][0, -1], atol=1e-4, rtol=1e-4)
        assert float(leads[row]) == pytest.approx(float(logits[case.claimed] - logits[case.true]), abs=1e-3)

        def last(old, row=row):
            return torch.cat([old[:, :-1], new[row][None, None]], 1)

        with torch.no_grad(), module.patched(model, {Site("residual", 2): last}):
            logits = model(text).logits[0, -1]
        assert float(turned[row]) == pytest.approx(float(logits[case.claimed] - logits[case.true]), abs=1e-3)


def test_a_knob_sets_its_component_and_nothing_else():
    direction = torch.nn.functional.normalize(torch.randn(8), dim=0)
    knob, states = Knob(0, direction, {"context": 2.0, "memory": -1.0}), torch.randn(5, 8)
    new = knob.set(states, "memory")
    torch.testing.assert_close(new @ direction, torch.full((5,), -1.0))
    torch.testing.assert_close(
        new - (new @ direction)[:, None] * direction, states - (states @ direction)[:, None] * direction
    )
    other = torch.nn.functional.normalize(torch.randn(8), dim=0)
    torch.testing.assert_close((knob.set(states, "memory", other) - states).norm(dim=1), (new - states).norm(dim=1))


def test_knobs_are_differences_of_means():
    states = {"context": torch.randn(3, 6, 8), "memory": torch.randn(3, 6, 8)}
    knob = knobs(states, [0, 2])[1]
    means = {intent: each[1, [0, 2]].mean(0) for intent, each in states.items()}
    gap = means["context"] - means["memory"]
    torch.testing.assert_close(knob.direction * (knob.values["context"] - knob.values["memory"]), gap)


def planted():
    """Answers "a" to "a is +:", or what the sentence before claims, as the sign says.

    Head 0.1 notes the sign at the last token; there, 1.0 notes the claimed letter, 1.1 says the letter asked for, and
    neurons of layer 2 say the claimed one, more loudly, where the sign is a plus.
    """
    circuit = (
        Planted(layers=4)
        .previous(0, 1)
        .head(1, 0, match=("position", "position"), shift=-8, move=("token", "spare"))
        .head(1, 1, match=("position", "position"), shift=-6, move=("token", "out"), strength=0.5)
    )
    for letter in LETTERS:
        token = token_of(letter)
        circuit.neuron(2, when={"previous": token_of("+"), "spare": token}, write={"out": token})
    return circuit.model()


COPIED = facts(str)
SIGNS = {"context": "{wrong}{asked} +:", "memory": "{wrong}{asked} -:"}


@pytest.fixture
def signs(monkeypatch):
    monkeypatch.setattr(module, "FRAMES", SIGNS)
    monkeypatch.setattr(module, "known_facts", lambda *given, **settings: COPIED)


def test_the_planted_direction_is_found_and_turns_every_answer(signs):
    model = planted()
    reading = ContextKnob().measure(model, Data.of(model, TOKENIZER))
    assert reading.of_role("context knob") in ([(1, 0)], [(2, 0)])  # the sign is there before either layer
    assert reading.metrics["answers that follow the context, intent context"].value == 1
    assert reading.metrics["answers that follow the context, intent memory"].value == 0
    assert reading.metrics["answers turned by the knob"].value == 1
    assert max(reading.metrics[f"answers turned by a random direction, {i}"].value for i in (1, 2, 3)) == 0
    shares = reading.scores["knob"].scores[:, 0]
    assert shares[0].abs() < 0.01 and shares[1] > 0.95 and shares[2] > 0.95 and shares[3] < 0.5

    found = find_knob(model, TOKENIZER, conflicts(COPIED))
    plus, minus = torch.zeros(2, 1280)
    plus[516 + token_of("+")] = minus[516 + token_of("-")] = 1  # the block "previous"
    assert float(found.knob.direction @ (plus - minus)) / 2**0.5 > 0.99


def test_turned_at_every_token_it_decides_too(signs):
    model, cases = planted(), conflicts(COPIED)
    knob = find_knob(model, TOKENIZER, cases).knob
    text = SIGNS["context"].format(wrong=cases[1].wrong, asked=cases[1].asked)
    ids = TOKENIZER(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert int(model(ids).logits[0, -1].argmax()) == cases[1].claimed
        with knob.turned(model, "memory"):
            assert int(model(ids).logits[0, -1].argmax()) == cases[1].true
        assert int(model(ids).logits[0, -1].argmax()) == cases[1].claimed


def test_random_weights_have_no_knob(monkeypatch):
    monkeypatch.setattr(module, "known_facts", lambda *given, **settings: FACTS)
    for seed in range(3):
        model = fv.tiny("llama", seed=seed)
        reading = ContextKnob().measure(model, Data.of(model, TOKENIZER))
        assert reading.roles == [] and "No single direction" in reading.summary


def test_the_claim_runs(signs, monkeypatch):
    monkeypatch.setattr(module, "BARE", "{wrong}{asked}  :")
    finding = module.OneDirectionDecides().run(Bench(planted(), TOKENIZER, load_text("prose")))
    assert all(finding.checks.values())
    assert finding.metrics["no intent told: answers that follow the context"].value == 0
    assert finding.metrics["no intent told, knob at memory"].value == 0


def test_too_few_facts_get_a_sentence(monkeypatch):
    model = fv.tiny("llama")
    with pytest.raises(FoveateError, match="give 8"):
        ContextKnob(facts=4).check(model, Data.of(model, TOKENIZER))
    monkeypatch.setattr(module, "known_facts", lambda *given, **settings: [])
    with pytest.raises(FoveateError, match="knows 0 facts"):
        module.OneDirectionDecides().run(Bench(model, TOKENIZER, load_text("prose")))
