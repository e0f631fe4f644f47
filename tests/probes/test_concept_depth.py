"""Concept depth: the layer that knows is found, shuffled labels are chance, and words don't stand on both sides."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.planted import Planted
from foveate.probes import Data
from foveate.probes.concept_depth import Concept, ConceptDepth, depth_of, last_states, near_best, ridge
from foveate.probes.concept_texts import tasks

TOKENIZER = fv.tiny_tokenizer()
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"
KIND = [at % 2 == 0 for at in range(len(LETTERS))]  # which sort a letter is of: only the planted neurons know


def knowing(at):
    """A model in which the neurons of one layer know the sort of a letter, and write it into one channel."""
    circuit = Planted(layers=4)
    for letter, kind in zip(LETTERS, KIND, strict=True):
        if kind:
            circuit.neuron(at, when={"token": TOKENIZER(letter).input_ids[0]}, write={"spare": 3}, strength=4)
    return circuit.model()


@pytest.mark.parametrize("at", [0, 2])
def test_the_layer_that_knows_is_found(at):
    found = depth_of(knowing(at), TOKENIZER, [f"x{letter}" for letter in LETTERS], KIND)
    assert found.clear and found.depth().value == (at + 1) / 4
    assert found.accuracy[: at + 1].max() == 0.5 and found.accuracy[at + 1 :].tolist() == [1.0] * (4 - at)


def test_what_no_layer_knows_is_not_found():
    found = depth_of(Planted(layers=2).model(), TOKENIZER, [f"x{letter}" for letter in LETTERS], KIND)
    assert not found.clear and found.accuracy.max() <= 0.5


def test_states_are_those_of_each_text_alone():
    model, texts = fv.tiny("llama"), ["abc", "a longer text", "b", "zzz"]
    states = last_states(model, TOKENIZER, texts)
    for at, text in enumerate(texts):
        hidden = model(TOKENIZER(text, return_tensors="pt").input_ids, output_hidden_states=True).hidden_states
        for depth in range(4):  # transformers gives the last one after the norm
            torch.testing.assert_close(states[depth, at], hidden[depth][0, -1].detach(), atol=1e-4, rtol=1e-3)


def test_the_probe_is_ridge_regression():
    x, new = torch.randn(20, 7).double(), torch.randn(5, 7).double()
    y = torch.randn(20, 2).double()
    a, b = (x - x.mean(0)) / x.std(0) / 7**0.5, (new - x.mean(0)) / x.std(0) / 7**0.5
    expected = b @ torch.linalg.inv(a.T @ a + 0.1 * torch.eye(7)) @ a.T @ (y - y.mean(0)) + y.mean(0)
    torch.testing.assert_close(ridge(x, y, new), expected)
    still = torch.cat([x, torch.full((20, 1), 3e4).double()], 1)  # a channel that does not vary
    assert ridge(still, y, torch.cat([new, torch.zeros(5, 1)], 1)).isfinite().all()


@pytest.mark.parametrize("task", tasks(3), ids=lambda task: task.name)
def test_labels_are_balanced_and_groups_on_one_side(task):
    judged = {group for group, each in zip(task.groups, task.judged, strict=True) if each}
    learnt = {group for group, each in zip(task.groups, task.judged, strict=True) if not each}
    assert judged and learnt and not judged & learnt
    for side in (True, False):
        labels = [label for label, each in zip(task.labels, task.judged, strict=True) if each == side]
        assert sum(labels) * 2 == len(labels)
    assert len(set(zip(task.texts, task.labels, strict=True))) >= 0.95 * len(task.texts)
    true, false = ({t for t, label in zip(task.texts, task.labels, strict=True) if label == k} for k in (True, False))
    assert not true & false


def test_what_is_said_to_follow_follows():
    for text, label in zip(tasks()[2].texts, tasks()[2].labels, strict=True):
        words = text.replace(".", "").split()
        if " has " in text:  # "A has 5 books and B has 3 So A has more books than B"
            amounts = {words[0]: int(words[2]), words[5]: int(words[7])}
            gap = amounts[words[9]] - amounts[words[14]]
            assert label == (gap > 0 if words[11] == "more" else gap < 0)
        else:
            above = {(words[0], words[4]), (words[5], words[9])}
            first, last = words[11], words[15]
            assert label == any((first, middle) in above and (middle, last) in above for middle in (words[0], words[5]))


def test_depth_and_its_interval():
    assert near_best(torch.tensor([[0.5, 0.96, 1.0], [1.0, 1.0, 1.0]])).tolist() == [0.5, 0.0]
    correct = torch.zeros(3, 40, dtype=torch.bool)
    correct[1, :30] = correct[2, :39] = True
    found = Concept(correct, torch.arange(40) // 2, 0.6)
    assert found.clear and found.depth().value == 1.0 and found.best().low < 39 / 40 <= found.best().high


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "letters.tsv"
    path.write_text("".join(f"{kind}\tx{letter}\n" for letter, kind in zip(LETTERS, KIND, strict=True)))
    model = knowing(1)
    data = Data.of(model, TOKENIZER, length=64)
    probe = ConceptDepth(file=str(path))
    probe.check(model, data)
    reading = probe.measure(model, data)
    assert reading.metrics["letters: depth, fraction of layers"].value == 0.5 and "letters after 2" in reading.summary
    path.write_text("yes a line without a tab\n")
    with pytest.raises(FoveateError, match="has no tab"):
        probe.check(model, data)
    with pytest.raises(FoveateError, match="can't be read"):
        ConceptDepth(file=str(tmp_path / "none.tsv")).check(model, data)


@pytest.mark.parametrize(
    "texts,labels,says",
    [
        (["a"] * 12, [1] * 12, r"have 1 different label \(1\)"),
        (["a"] * 12, [1, 2, 3] * 4, "have 3 different labels"),
        (["a"] * 12, [1] * 11, "12 texts and 11 labels"),
        (["a"] * 12, [1] * 10 + [2] * 2, "only 2 texts are labelled 2"),
        (["a" * 300] * 12, [1, 2] * 6, "has 300 tokens"),
        ([""] * 12, [1, 2] * 6, "has 0 tokens"),
    ],
)
def test_bad_input_gets_a_sentence(texts, labels, says):
    with pytest.raises(FoveateError, match=says):
        depth_of(Planted(layers=1).model(), TOKENIZER, texts, labels)


def test_the_claim_runs():
    from foveate.claims import CLAIMS
    from foveate.data.text import load_text
    from foveate.tasks.base import Bench

    bench = Bench(fv.tiny("llama", num_hidden_layers=2), TOKENIZER, load_text())
    finding = CLAIMS["concept-depth"]().run(bench)
    assert len(finding.checks) == 8 and not finding.checks["8 bits: deeper"]
