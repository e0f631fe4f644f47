"""Induction: planted circuits are found, and nothing else."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.probes import Data
from foveate.probes.induction import Induction


@pytest.fixture(scope="module")
def reading():
    model = fv.planted()
    return Induction().measure(model, Data.of(model, fv.tiny_tokenizer(), length=128, passages=2))


def test_what_was_planted_is_found(reading):
    assert reading.of_role("induction") == [(1, 3)]
    assert reading.of_role("previous token") == [(0, 1)]


def test_nothing_else_is(reading):
    assert {(r.role, r.layer, r.unit) for r in reading.roles} <= {
        ("induction", 1, 3),
        ("previous token", 0, 1),
        ("duplicate token", 2, 2),  # it looks at all tokens like its own, one of two
    }


def test_scores_are_those_of_eager_attention():
    model = fv.tiny("llama")
    data = Data.of(model, fv.tiny_tokenizer(), length=32, passages=1)
    ids = data.stream("repeat", model)
    scores = Induction().measure(model, data).scores
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(maps):
        rows = torch.arange(17, 32)
        expected = weights[0, :, rows, rows - 15].mean(-1)
        torch.testing.assert_close(scores["induction"].scores[layer].float(), expected)
        rows = torch.arange(1, 32)
        torch.testing.assert_close(scores["previous"].scores[layer].float(), weights[0, :, rows, rows - 1].mean(-1))
