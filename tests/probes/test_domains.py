"""Domains: a head that rests on one kind of text only is found; one that always rests, or never, is not."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.data.text import Text, load_text
from foveate.models.planted import BLOCKS, HIDDEN, Planted
from foveate.probes import Data
from foveate.probes.domains import Domains, DormantHeadsAreIdle, _error
from foveate.tasks.base import Bench

TOKENIZER = fv.tiny_tokenizer()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DRAWN = torch.randint(26, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
WORDS = Text("prose", "".join(LETTERS[i] for i in DRAWN), "not read")
"""A prose of nothing but letters; in code about half are others."""


def data(model, length=128, passages=4, text="prose"):
    if text == "letters":
        return Data(TOKENIZER, WORDS, length, passages)
    return Data.of(model, TOKENIZER, length=length, passages=passages)


class Switched(Planted):
    """With a head that rests on the first token where the token is one of these, and attends evenly else."""

    def resting_at(self, layer, head, characters):
        query, key = torch.zeros(HIDDEN, self.width), torch.zeros(HIDDEN, self.width)
        for token in fv.tiny_tokenizer()(characters).input_ids:
            query[BLOCKS["token"].start + token, 0] = 1
        key[BLOCKS["position"].start, 0] = 1
        self._attend(layer, head, query, key, None)
        return self


@pytest.fixture(scope="module")
def reading():
    planted = Switched().sink(1, 0).resting_at(1, 2, LETTERS).resting_at(2, 1, "(){}[]=_:")
    model = planted.model()
    return Domains().measure(model, data(model, passages=4, text="letters"))


def test_exactly_the_head_that_works_on_one_kind_and_rests_on_the_other_is_found(reading):
    assert [(r.role, r.layer, r.unit) for r in reading.roles] == [("active on code only", 1, 2)]
    assert "1.2" in reading.summary and reading.metrics["heads active on code only"].value == 1


def test_activity_is_what_was_planted(reading):
    code, prose = (reading.scores[f"active on {name}"].scores for name in ("code", "prose"))
    assert float(code[1, 0]) < 0.01 and float(prose[1, 0]) < 0.01  # it always rests
    assert float(prose[1, 2]) < 0.01 and 0.2 < float(code[1, 2]) < 0.9
    assert float(prose[2, 1]) > 0.9 and float(code[2, 1]) > 0.7  # it hardly ever does
    assert float(code[0, 0]) > 0.9 and float((code - prose)[0].abs().max()) < 0.01


def test_a_passage_that_does_not_agree_speaks_against_it():
    text = Text("prose", WORDS.calibration[:400] + "([{=" * 100, "not read")  # the last passages rest on nothing
    model = Switched().resting_at(1, 2, LETTERS).model()
    assert Domains().measure(model, Data(TOKENIZER, text, 128, 4)).roles == []


def test_one_passage_of_each_kind_says_nothing():
    model = Switched().resting_at(1, 2, LETTERS).model()
    assert Domains().measure(model, data(model, passages=1, text="letters")).roles == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "planted"])
def test_random_weights_and_planted_heads_that_know_no_kind_have_no_role(family):
    model = fv.planted() if family == "planted" else fv.tiny(family)
    assert Domains().measure(model, data(model, 64)).roles == []


def test_activity_is_that_of_eager_attention(monkeypatch):
    monkeypatch.setattr("foveate.probes.watch.BLOCK", 700)
    model = fv.tiny("llama")
    given = data(model, 32, 2)
    scores = Domains().measure(model, given).scores
    model.set_attn_implementation("eager")
    for name in ("prose", "code"):
        with torch.no_grad():
            maps = model(given.stream(name, model), output_attentions=True).attentions
        expected = torch.stack([1 - weights[:, :, 8:, 0].mean((0, 2)) for weights in maps])
        torch.testing.assert_close(scores[f"active on {name}"].scores.float(), expected)


def test_the_standard_error_has_the_median_spread_as_its_floor():
    a = torch.tensor([[1.0, 2, 3], [3, 2, 9]])[:, None]  # variances 2, 0, 18
    b = torch.tensor([[1.0, 1, 1], [1, 1, 1]])[:, None]
    expected = torch.tensor([[1.0, 1.0, 3.0]])  # the median, 2, stands in for 0
    torch.testing.assert_close(_error(a, b), expected)


def test_the_claim_runs(monkeypatch):
    monkeypatch.setattr(DormantHeadsAreIdle, "passages", 2)
    model = fv.tiny("llama")
    finding = DormantHeadsAreIdle().run(Bench(model, TOKENIZER, load_text("prose")))
    assert len(finding.checks) == 7 and all(m.low <= m.value <= m.high for m in finding.metrics.values())
