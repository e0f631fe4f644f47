"""Scores out of a reading's file, and what spends them."""

from __future__ import annotations

import json

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.scores.file import load_scores

GIVEN = {"tokenizer": fv.tiny_tokenizer(), "length": 64, "passages": 1, "show": False}


@pytest.fixture(scope="module")
def model():
    return fv.planted()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("read")
    fv.read(model, ["induction"], out=out, **GIVEN)
    return out


def test_they_are_the_readings(model, folder):
    scores = load_scores(folder / "reading.json", "induction.induction", model)
    assert divmod(int(scores.scores.argmax()), 4) == (1, 3)
    assert scores.kind == "head"


def test_bad_input_is_a_sentence(model, folder, tmp_path):
    with pytest.raises(FoveateError, match="did you mean induction.previous"):
        load_scores(folder, "induction.previus")
    with pytest.raises(FoveateError, match="no scores called 'induction'"):  # it has three
        load_scores(folder, "induction")
    with pytest.raises(FoveateError, match="no reading at"):
        load_scores(tmp_path / "nothing", "induction.previous")
    with pytest.raises(FoveateError, match="another model"):
        load_scores(folder, "induction.previous", fv.tiny("llama"))
    damaged = tmp_path / "reading.json"
    damaged.write_text("[]")
    with pytest.raises(FoveateError, match="damaged"):
        load_scores(tmp_path, "induction.previous")
    given = json.loads((folder / "reading.json").read_text())
    damaged.write_text(json.dumps({**given, "format": 99}))
    with pytest.raises(FoveateError, match="format 99"):
        load_scores(tmp_path, "induction.previous")


def test_a_budget_spends_them(model, folder):
    prompt = torch.arange(3, 43).unsqueeze(0)
    recipe = f"streaming:keep=0.5,budget=measured(file={folder},of=induction.induction,whole=0.0834)"
    with fv.apply(model, recipe):
        cache = model(prompt, use_cache=True).past_key_values
    held = torch.stack([layer.held()[0] for layer in cache.layers])
    assert (held == 40).nonzero().tolist() == [[1, 3]]
    assert int(held.sum()) <= 12 * 20


def test_a_budget_takes_heads_only(model, folder, tmp_path):
    given = json.loads((folder / "reading.json").read_text())
    given["readings"]["induction"]["scores"]["previous"]["kind"] = "token"
    (tmp_path / "reading.json").write_text(json.dumps(given))
    with (
        pytest.raises(FoveateError, match="scores of its heads"),
        fv.apply(model, f"streaming:keep=0.5,budget=measured(file={tmp_path},of=induction.previous)"),
    ):
        pass


def test_the_best_query_head_speaks_for_its_kv_head():
    from foveate.cache.budgets.measured import _of_kv_heads
    from foveate.methods import UnitScores

    scores = UnitScores("head", torch.tensor([[0.1, 0.9, 0.3, float("nan")]]))
    torch.testing.assert_close(_of_kv_heads(scores, 2, "x"), torch.tensor([[0.9, 0.3]]))


def test_a_pruner_spends_them(model, folder):
    recipe = f"scored:keep=0.75,file={folder},of=induction.previous"
    with fv.apply(model, recipe):
        kept = [layer.attention.num_heads for layer in fv.anatomy(model).layers]
    assert sum(kept) == 9 and kept[0] >= 1  # head 0.1 has the highest score
    small = fv.thin(model, recipe, tokenizer=fv.tiny_tokenizer())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_scores_of_a_cut_model_are_still_its_kin_but_not_of_other_layers(model, folder):
    with fv.apply(model, "skip-layers:keep=0.67"):
        assert load_scores(folder, "induction.previous", model).kind == "head"
    shallow = fv.thin(model, "skip-layers:keep=0.67", tokenizer=fv.tiny_tokenizer())
    with pytest.raises(FoveateError, match="3 layers, and this one has 2"):
        load_scores(folder, "induction.previous", shallow)


def test_what_the_probe_measured_is_what_the_budget_retrieval_spends(model, tmp_path):
    from foveate.cache.budgets.base import BUDGETS
    from foveate.methods import Target

    fv.read(model, ["retrieval-heads"], out=tmp_path, **GIVEN)
    target = Target.of(model, tokenizer=fv.tiny_tokenizer())
    measured = BUDGETS.parse(f"measured:file={tmp_path},of=retrieval-heads,whole=0.1")
    assert torch.equal(measured.weights(target, 0.5), BUDGETS.parse("retrieval:whole=0.1").weights(target, 0.5))
