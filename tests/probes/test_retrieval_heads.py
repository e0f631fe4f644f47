"""Retrieval heads: the planted one is found, and the budget spends the very measurement that the probe made."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.methods import Target
from foveate.models.planted import Planted
from foveate.probes import Data
from foveate.probes import retrieval_heads as module
from foveate.probes.retrieval_heads import RetrievalHeads, stability
from foveate.scores import known, retrieval_of, retrieved
from foveate.tasks.base import Bench


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")  # one for all tests: each model is measured once


@pytest.fixture(autouse=True)
def _own_cache(folder, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(folder))


def read(model, **given):
    return RetrievalHeads().measure(model, Data.of(model, fv.tiny_tokenizer(), **given))


def test_the_planted_head_is_found_and_nothing_else():
    reading = read(fv.planted())
    assert [(r.role, r.layer, r.unit) for r in reading.roles] == [("retrieval", 1, 3)]
    assert reading.scores["retrieval"].scores[1, 3] > 0.5
    assert reading.setting["length"] < 256  # the question finds positions after the text
    assert "1 head of 12" in reading.summary


def test_without_the_head_that_it_is_made_of_nothing_retrieves():
    model = Planted().head(1, 3, match=("token", "previous"), move=("token", "out")).model()
    assert read(model).roles == []


def test_the_budget_spends_what_the_probe_measured(monkeypatch):
    model = fv.tiny("llama")
    reading = read(model)
    monkeypatch.setattr(known, "retrieval_hits", lambda *given: pytest.fail("measured again"))
    spent = retrieval_of(Target.of(model, tokenizer=fv.tiny_tokenizer()))
    assert spent.kind == "kv_head"
    torch.testing.assert_close(spent.scores, reading.scores["retrieval"].scores.view(4, 2, 2).amax(-1))
    with fv.apply(model, "streaming:keep=0.5,budget=retrieval(whole=0.25)", tokenizer=fv.tiny_tokenizer()):
        model(torch.arange(3, 43).unsqueeze(0), use_cache=True)
    assert read(model).to_json()["scores"] == reading.to_json()["scores"]


def test_it_tells_how_far_it_is():
    told = []
    read(fv.tiny("phi3"), progress=told.append)  # not measured before
    assert len(told) > known.CASES and told == sorted(told) and told[-1] == 1


def test_scores_are_shares_of_hits_over_some_needles_or_all():
    found = known.Retrieved(torch.tensor([[[2.0, 0.0]], [[1.0, 3.0]]]), torch.tensor([2, 4]), 64)
    torch.testing.assert_close(found.scores().scores, torch.tensor([[3 / 6, 3 / 6]]))
    torch.testing.assert_close(found.scores(slice(1, None, 2)).scores, torch.tensor([[1 / 4, 3 / 4]]))


def test_stability_is_that_of_needles_with_even_and_odd_numbers():
    hits = torch.zeros(4, 1, 5)
    hits[0::2, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0])
    hits[1::2, 0] = torch.tensor([4.0, 3.0, 2.0, 0.0, 0.0])
    assert stability(known.Retrieved(hits, torch.full((4,), 5), 64)) == 1
    hits[1::2] = hits[1::2].flip(-1)
    assert stability(known.Retrieved(hits, torch.full((4,), 5), 64)) < 0
    assert stability(known.Retrieved(torch.zeros(4, 1, 5), torch.full((4,), 5), 64)) is None


def test_a_model_with_too_few_positions_is_told_so():
    model = fv.tiny("gpt2")
    short = Data.of(model, fv.tiny_tokenizer())
    model.config.n_positions = model.config.max_position_embeddings = 64
    with pytest.raises(FoveateError, match="has 64 positions: take a model with more"):
        RetrievalHeads().check(model, short)


def test_the_claim_runs(monkeypatch):
    monkeypatch.setattr(module, "PASSKEY", {"cases": 1, "tokens": 128})
    model = fv.planted()
    told = []
    finding = module.RetrievalHeadsRetrieve().run(Bench(model, fv.tiny_tokenizer(), load_text(), told.append))
    assert finding.metrics["heads masked until at most a quarter is found"].value == 1
    assert told == sorted(told)


def test_the_shared_measurement_is_left_as_cases():
    found = retrieved(Target.of(fv.planted(), tokenizer=fv.tiny_tokenizer()))
    assert found.hits.shape == (known.CASES, 3, 4) and found.answers.shape == (known.CASES,)
    assert bool((found.hits <= found.answers[:, None, None]).all())
