"""Arithmetic: a planted adder's heads and MLP are found, and nothing else."""

from __future__ import annotations

import functools

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.planted import Planted
from foveate.probes import Data
from foveate.probes.arithmetic import SUMS, Arithmetic, effects, right, sums


@functools.cache
def adder():
    """Heads 0.1 and 0.2 fetch the two numbers to the equals sign, and the MLP of layer 1 knows each sum."""
    here, (sign,) = ("position", "position"), fv.tiny_tokenizer()("=").input_ids
    circuit = Planted(layers=3)
    circuit.head(0, 1, match=here, shift=-3, move=("token", "previous"))
    circuit.head(0, 2, match=here, shift=-1, move=("token", "spare"))
    for a, b in SUMS:
        first, second, result = fv.tiny_tokenizer()(f"{a}{b}{a + b}").input_ids
        circuit.neuron(1, when={"token": sign, "previous": first, "spare": second}, write={"out": result})
    return circuit.model()


@pytest.fixture(scope="module")
def reading():
    model = adder()
    return Arithmetic(pairs=3).measure(model, Data.of(model, fv.tiny_tokenizer()))


def test_the_adder_adds():
    assert right(adder(), sums(fv.tiny_tokenizer(), SUMS, [(1, 2)])) == [1.0] * len(SUMS)


def test_what_was_planted_is_found_and_nothing_else(reading):
    assert sorted(reading.of_role("fetches numbers")) == [(0, 1), (0, 2)]
    assert reading.of_role("makes the result") == [(1, 0)]
    assert reading.metrics["sums right"].value == 1
    rest = reading.scores["arithmetic"].scores.clone()
    rest[0, 1:3] = 0
    assert rest.abs().max() < 0.05


def test_it_says_which_heads_look_at_the_sum(reading):
    looks = reading.scores["looks at the sum"].scores
    assert (looks[0, 1:3] > 0.9).all()
    torch.testing.assert_close(looks[2, 0], torch.tensor(3 / 28))  # an even head, over 28 tokens


def test_a_model_that_cannot_add_has_no_roles():
    found = effects(fv.tiny("llama"), fv.tiny_tokenizer())
    assert found.pairs == 0 and not found.heads.any()


def test_bad_input_is_told():
    model = fv.tiny("llama")
    with pytest.raises(FoveateError, match="at least 2"):
        Arithmetic(pairs=1).check(model, Data.of(model, fv.tiny_tokenizer()))
