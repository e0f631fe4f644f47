"""Circuit overlap: planted heads that decide two tasks are found, and chance is counted right."""

from __future__ import annotations

import itertools

import pytest
import torch

import foveate as fv
import foveate.probes.circuit_overlap as module
from foveate.claims import Finding
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.models.patching import activation_patching, head_sites, recorded
from foveate.models.planted import Planted
from foveate.probes import Data
from foveate.probes.circuit_overlap import CircuitOverlap, Pairs, Redirected, Runs, at_least, effects, pairs
from foveate.tasks.base import Bench


@pytest.mark.parametrize("task", module.TASKS)
def test_prompts_differ_only_in_what_decides(task):
    tokenizer = fv.tiny_tokenizer()
    given = pairs(task, tokenizer, 6, seed=0)
    assert given.ids.shape == given.other.shape and len(given.ids) == 6
    assert torch.equal(given.ids[:, : given.start], given.other[:, : given.start])
    assert (given.ids[:, given.start :] != given.other[:, given.start :]).any(1).all()
    assert (given.wrong != given.right[:, None]).all()
    for row, ids in enumerate(given.ids.tolist()):
        assert [ids[spot] for spot in given.spots[row]] == given.wrong[row].tolist()
    text = tokenizer.decode(given.ids[0])
    assert ("gave a" in text) == (task == "ioi") and text.endswith(" to " if task == "ioi" else " is ")


def test_the_answer_of_ioi_is_who_was_named_once():
    tokenizer = fv.tiny_tokenizer()
    given = pairs("ioi", tokenizer, 8, seed=3)
    for ids, right, wrong in zip(given.ids, given.right, given.wrong, strict=True):
        words = tokenizer.decode(ids).replace(",", "").split()
        once, twice = ([w for w in words[:5] if w[0].isupper() and words.count(w) == n and w != "When"] for n in (1, 2))
        assert once[0][0] == tokenizer.decode(right) and twice[0][0] == tokenizer.decode(wrong)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3", "opt", "gpt_neox"])
def test_effects_are_those_of_patching_whole_runs(family):
    model = fv.tiny(family)
    given = pairs("ioi", fv.tiny_tokenizer(), 3, seed=0)
    runs = Runs(model, given, given.start)
    sites = head_sites(fv.anatomy(model))
    with torch.no_grad(), recorded(model, sites) as values:
        model(given.other, use_cache=False)
    slow = activation_patching(model, given.ids, values, sites, lambda logits: logits[:, -1, runs.columns])
    torch.testing.assert_close(effects(model, runs), slow, atol=1e-4, rtol=1e-4)


def repeated(first: int):
    """Prompts "A B C A" that go on with B, and with D in the last place: as a task for an induction circuit."""

    def made(task, tokenizer, count, seed):
        rows = torch.arange(count)[:, None] * 5 + torch.tensor([[3, 4, 5, 3]]) + first
        other = rows.clone()
        other[:, 3] += 3
        return Pairs(rows, other, rows[:, 1], rows[:, 2:3], torch.full((count, 1), 2), 3)

    return made


@pytest.fixture
def reading(monkeypatch):
    monkeypatch.setattr(module, "pairs", lambda task, *rest: repeated(0 if task == "ioi" else 100)(task, *rest))
    model = Planted(layers=3).previous(0, 1).head(1, 3, match=("token", "previous"), move=("token", "out")).model()
    return CircuitOverlap(prompts=6).measure(model, Data.of(model, fv.tiny_tokenizer()))


def test_what_was_planted_decides_both_tasks(reading):
    assert reading.of_role("shared circuit") == [(1, 3)]
    for task in module.TASKS:
        scores = reading.scores[task].scores
        assert scores[1, 3] == pytest.approx(1, abs=0.01)  # all of it goes through this head
        scores[1, 3] = 0
        assert scores.max() < 0.01  # the earlier head says the same in both prompts
    assert reading.metrics["heads in both circuits"].value == 1
    assert reading.metrics["as many by chance (probability)"].value == pytest.approx(1 / 12)


def test_random_weights_have_no_circuit():
    for seed in range(4):
        model = fv.tiny("gpt2", seed=seed)
        assert CircuitOverlap(prompts=6).measure(model, Data.of(model, fv.tiny_tokenizer())).roles == []


def test_chance_is_counted():
    sets = list(itertools.combinations(range(7), 3))
    for shared in range(4):
        counted = sum(len(set(a) & set(b)) >= shared for a in sets for b in sets) / len(sets) ** 2
        assert at_least(shared, 3, 7) == pytest.approx(counted)


def test_a_redirected_head_says_what_stands_at_the_wrong_colors():
    model = Planted(layers=2).head(1, 2, match=("token", "previous"), move=("token", "out")).model()
    ids = torch.tensor([[10, 20, 30, 40]])
    given = Pairs(ids, ids, torch.tensor([10]), torch.tensor([[20, 30]]), torch.tensor([[1, 2]]), 3)
    turned = Redirected(model, given)
    options = turned.logits([(1, 2)]).gather(1, turned.runs.where)[0]
    evenly = turned.logits([]).gather(1, turned.runs.where)[0]
    assert evenly.std() < 0.01 * evenly.abs().max()
    assert options[0].abs() < 0.2 and options[1] == pytest.approx(float(options[2])) and options[1] > 5
    untouched = turned.logits([(0, 0)]).gather(1, turned.runs.where)[0]
    torch.testing.assert_close(untouched, evenly)  # a head that gives nothing


def test_the_claim_runs(monkeypatch):
    for name, size in (("PROMPTS", 4), ("JUDGED", 4), ("SETS", 2)):
        monkeypatch.setattr(module, name, size)
    model = fv.tiny("llama")
    finding = module.CircuitsAreReused().run(Bench(model, fv.tiny_tokenizer(), load_text("prose")))
    assert isinstance(finding, Finding) and len(finding.checks) == 4


def test_what_is_impossible_gets_a_sentence():
    model = fv.planted()
    data = Data.of(model, fv.tiny_tokenizer())
    CircuitOverlap().check(model, data)
    with pytest.raises(FoveateError, match="give 4"):
        CircuitOverlap(prompts=2).check(model, data)
    short = fv.tiny("llama", max_position_embeddings=128)
    with pytest.raises(FoveateError, match="128 positions"):
        CircuitOverlap().check(short, data)
    with pytest.raises(FoveateError, match="too unevenly"):
        pairs("ioi", Uneven(), 4, 0)


class Uneven:
    """A tokenizer that cuts no two texts into as many tokens."""

    def __init__(self):
        self.seen: dict[str, int] = {}

    def __call__(self, text, **kwargs):
        length = self.seen.setdefault(text, len(self.seen) + 1)
        return {"input_ids": [1] * length}
