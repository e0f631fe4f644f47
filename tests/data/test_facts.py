"""Facts: subjects lie where they are said to lie, and only what a model completes rightly is known."""

from __future__ import annotations

import pytest

import foveate as fv
from foveate.data.facts import FACTS, Fact, by_length, known_facts, prompt_of
from foveate.errors import FoveateError
from foveate.models.planted import Planted

SPACE, P = fv.tiny_tokenizer()(" P").input_ids
KNOWN = Fact("mark", "F", "ab{}cd ", "P")


def knowing():
    """Knows that P comes where a text ends in a space."""
    return Planted(layers=1).neuron(0, when={"token": SPACE}, write={"out": P}).model()


def test_the_subject_lies_where_it_is_said_to_lie():
    tokenizer = fv.tiny_tokenizer()
    for fact in FACTS:
        prompt = prompt_of(fact, tokenizer)
        assert tokenizer.decode(prompt.ids[0, prompt.start : prompt.end]).strip() == fact.subject
        assert tokenizer.decode(prompt.ids[0]) == fact.template.format(fact.subject)
        assert prompt.start > 0 and prompt.end <= prompt.last  # neither first nor last: many things rest there


def test_only_what_is_completed_rightly_is_known():
    facts = [KNOWN, KNOWN._replace(answer="Q"), KNOWN._replace(template="ab{}cd")]
    (known,) = known_facts(knowing(), fv.tiny_tokenizer(), facts)
    assert known.fact == KNOWN and known.answer == P and known.probability > 0.9
    assert (known.start, known.end, known.last) == (2, 3, 5)


def test_on_random_weights_nothing_is_known():
    assert known_facts(fv.tiny("llama"), fv.tiny_tokenizer(), FACTS[:30]) == []


def test_other_subjects_come_before_other_wordings():
    facts = [KNOWN, KNOWN._replace(template="abc{}d "), KNOWN._replace(subject="G")]
    known = known_facts(knowing(), fv.tiny_tokenizer(), facts, most=2)
    assert [prompt.fact for prompt in known] == [facts[0], facts[2]]


def test_those_of_one_shape_are_read_together():
    tokenizer = fv.tiny_tokenizer()
    facts = [KNOWN, KNOWN._replace(template="abc{}d "), KNOWN._replace(subject="G")]
    assert by_length([prompt_of(fact, tokenizer) for fact in facts]) == [[0, 2], [1]]


def test_a_template_without_a_place_for_the_subject_is_refused():
    with pytest.raises(FoveateError, match="no place for the subject"):
        prompt_of(KNOWN._replace(template="abcd"), fv.tiny_tokenizer())
    with pytest.raises(FoveateError, match="can't be told apart"):
        prompt_of(KNOWN._replace(answer=""), fv.tiny_tokenizer())
