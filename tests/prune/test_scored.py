"""Scored: what a reading's file scored lowest leaves, in every family."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.errors import FoveateError
from foveate.methods import apply
from foveate.models.anatomy import anatomy
from foveate.models.stored import kin
from foveate.models.surgery import has_attention, has_mlp
from foveate.models.tiny import TINY_FAMILIES, tiny
from foveate.scores.file import FORMAT

IDS = torch.randint(3, 120, (1, 32), generator=torch.Generator().manual_seed(1))


def reading(model, folder, **scores):
    """A file as `foveate read` writes it, with scores by name: (kind, rows)."""
    made = {name: {"kind": kind, "scores": rows} for name, (kind, rows) in scores.items()}
    given = {"format": FORMAT, "model": "tiny", "kin": kin(model), "readings": {"made": {"scores": made}}}
    (folder / "reading.json").write_text(json.dumps(given))
    return folder


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_lowest_sublayers_leave_and_come_back(family, tmp_path):
    model = tiny(family)
    whole = model(IDS).logits
    rows = [[0.4], [0.1], [0.3], [0.2]]
    reading(model, tmp_path, a=("attention", rows), m=("mlp", rows))
    with apply(model, f"scored:keep=0.5,file={tmp_path},of=made.a+scored:keep=0.75,file={tmp_path},of=made.m"):
        layers = anatomy(model).layers
        assert [has_attention(layer) for layer in layers] == [True, False, True, False]
        assert [has_mlp(layer) for layer in layers] == [True, False, True, True]
        assert not torch.equal(model(IDS).logits, whole)
    assert torch.equal(model(IDS).logits, whole)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_keep_1_is_the_model_as_it_is(family, tmp_path):
    model = tiny(family)
    whole = model(IDS).logits
    reading(model, tmp_path, a=("attention", [[0.4], [0.1], [0.3], [0.2]]))
    with apply(model, f"scored:keep=1,file={tmp_path},of=made.a"):
        assert torch.equal(model(IDS).logits, whole)


def test_scores_of_what_cannot_be_cut_are_told(tmp_path):
    model = tiny("llama")
    reading(model, tmp_path, depth=("token", [[0.4], [0.1], [0.3], [0.2]]))
    with (
        pytest.raises(FoveateError, match="kind token"),
        apply(model, f"scored:keep=0.5,file={tmp_path},of=made.depth"),
    ):
        pass
