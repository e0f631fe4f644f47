"""Bigram-Backcopy: the data are what they are said to be, seeds don't know each other, and models learn it."""

from __future__ import annotations

import pytest
import torch

from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.probes.backcopy import BEGIN, Backcopy, Models, Shape, extremes


@pytest.fixture(scope="module")
def task():
    return Backcopy(load_text("prose").calibration[:20000], vocab=24, triggers=2)


def test_after_a_trigger_comes_what_stood_before_it_and_else_what_the_bigrams_say(task):
    rows = task.draw(3000, 24, seed=0)
    assert (rows[:, 0] == BEGIN).all() and (rows[:, 1:] != BEGIN).all()
    before, now, after = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
    at = task.is_trigger(now)
    assert 0.1 < float(at.float().mean()) < 0.9
    assert torch.equal(after[at], before[at])
    token = int(now[~at].mode().values)  # the most frequent that is no trigger
    counts = torch.bincount(after[~at & (now == token)], minlength=24).float()
    assert (counts / counts.sum() - task.next[token]).abs().max() < 0.03


def test_the_least_loss_is_that_of_the_true_chances(task):
    rows = task.draw(50, 12, seed=1)
    nats = []
    for row in rows.tolist():
        for i in range(2, 12):
            copied = row[i - 1] in (1, 2)
            nats.append(0.0 if copied else -float(task.next[row[i - 1], row[i]].log()))
    assert task.least(rows) == pytest.approx(sum(nats) / len(nats), rel=1e-4)


@pytest.mark.parametrize("shape", [Shape(1, 16), Shape(2, 16, relu=True), Shape(1, 16, sgd=True, lr=0.1)])
def test_seeds_side_by_side_train_as_each_alone(task, shape):
    rows = task.draw(64, 12, seed=2)
    both, alone = Models(shape, 24, 12, [3, 4]), Models(shape, 24, 12, [4])
    losses, loss = both.train(rows, 5, 8), alone.train(rows, 5, 8)
    torch.testing.assert_close(losses[1:], loss)
    assert losses[0] != losses[1]
    torch.testing.assert_close(both.weights["0.q"][1:], alone.weights["0.q"])


def test_nothing_looks_ahead_and_a_softmax_row_sums_to_one(task):
    rows = task.draw(4, 12, seed=3)
    other = rows.clone()
    other[:, 8:] = 5
    models = Models(Shape(2, 16), 24, 12, [0])
    a, b = models.look(rows[None]), models.look(other[None])
    torch.testing.assert_close(a.logits[:, :, :8], b.logits[:, :, :8])
    torch.testing.assert_close(a.weights[1].sum(-1), torch.ones(1, 4, 12))
    relu = Models(Shape(1, 16, relu=True), 24, 12, [0]).look(rows[None]).weights[0]
    assert (relu >= 0).all() and not torch.allclose(relu.sum(-1), torch.ones(1, 4, 12))


def test_what_is_measured_of_the_first_token(task):
    rows = task.draw(6, 12, seed=4)
    models = Models(Shape(1, 16), 24, 12, [0])
    with torch.no_grad():
        found, inside = extremes(task, models, rows), models.look(rows[None])
    values = inside.values[0][0].norm(dim=-1)
    assert float(found.drain) == pytest.approx(float(values[:, 0].mean() / values[:, 1:].median()), rel=1e-5)
    off = [(r, i) for r in range(6) for i in range(8, 12) if not task.is_trigger(rows)[r, i]]
    share = sum(float(inside.weights[0][0, r, i, 0]) for r, i in off) / len(off)
    assert float(found.sink) == pytest.approx(share, rel=1e-5)


def test_a_model_learns_to_copy_and_comes_to_rest_on_the_first_token_with_softmax_only(task):
    rows, fresh = task.draw(4096, 24, seed=5), task.draw(64, 24, seed=6)
    found = {}
    for name, relu in (("softmax", False), ("relu", True)):
        models = Models(Shape(1, 24, relu=relu, lr=1e-2), 24, 24, [0])
        models.train(rows, 500, 32)
        found[name] = extremes(task, models, fresh)
        assert float(found[name].above) < 0.25
    assert float(found["softmax"].sink) > 0.3 and float(found["softmax"].drain) < 0.7
    assert float(found["relu"].sink) < 0.2


def test_a_text_of_few_characters_gets_a_sentence():
    with pytest.raises(FoveateError, match="different"):
        Backcopy("abab" * 10)
