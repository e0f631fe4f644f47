"""Rerank: a planted head finds the document that holds the query, and calibration takes off what others look at."""

from __future__ import annotations

import importlib

import pytest
import torch

import foveate as fv
from foveate.claims import CLAIMS
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.methods import UnitScores
from foveate.models.planted import Planted
from foveate.probes.rerank import ASKING, LEAD, NOTHING, attended, bm25, calibrated, raw, rerank, searches
from foveate.tasks.base import Bench

DOCUMENTS = ["one two", "six five", "the fuzz", "ten ten"]


@pytest.fixture(scope="module")
def model():
    """Head 0.1 looks at tokens like its own; 0.2 and 0.3 rest on a token of the first document, whatever is asked."""
    first = len(LEAD) + 4
    return (
        Planted(layers=1)
        .head(0, 1, match=("token", "token"))
        .sink(0, 2, position=first)
        .sink(0, 3, position=first)
        .model()
    )


def ranked(model, **given):
    return rerank(model, "zz", DOCUMENTS, tokenizer=fv.tiny_tokenizer(), **given)


def test_calibration_finds_what_raw_attention_misses(model):
    assert ranked(model).order[0] == 2 and ranked(model).passes == 2
    assert ranked(model, calibrate=False).order[0] == 0 and ranked(model, calibrate=False).passes == 1


def test_heads_can_be_chosen(model):
    mask = torch.zeros(1, 4)
    mask[0, 1] = 1
    chosen = ranked(model, calibrate=False, heads=UnitScores("head", mask))
    assert chosen.order[0] == 2
    double = ranked(model, calibrate=False, heads=UnitScores("head", 2 * mask))
    assert double.scores == pytest.approx([2 * score for score in chosen.scores])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_what_is_paid_is_what_eager_attention_says_of_whole_prompts(family):
    model, tokenizer, queries = fv.tiny(family), fv.tiny_tokenizer(), [NOTHING, "where is it?", "six"]
    looked, spans = attended(model, tokenizer, DOCUMENTS, queries)
    model.set_attn_implementation("eager")
    prompt = LEAD + "".join(f"\n\n[{i + 1}] {text}" for i, text in enumerate(DOCUMENTS)) + ASKING
    before = tokens(prompt, tokenizer).shape[1]
    for row, query in zip(looked, queries, strict=True):
        with torch.no_grad():
            maps = model(tokens(f"{prompt} {query}", tokenizer), output_attentions=True).attentions
        expected = sum(weights[0, :, before:, :before].double().mean(1).sum(0) for weights in maps)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)
    assert [tokenizer.decode(tokens(prompt, tokenizer)[0, span]).strip() for span in spans][2] == "[3] the fuzz"
    assert float(raw(looked[0], spans)[1]) == pytest.approx(float(looked[0, spans[1]].sum()))


def test_outlying_tokens_are_left_out():
    looked, blank = torch.zeros(12), torch.zeros(12)
    looked[:10] = 1.0
    blank[9] = 50.0  # one token of the first document that only the empty query looks at
    assert calibrated(looked, blank, [slice(0, 10), slice(10, 12)]).tolist() == [9.0, 0.0]


@pytest.mark.parametrize("texts", [["a"], ["a", "b", "c", "d", "e", "f"]])
def test_it_always_ranks_all_documents_and_leaves_the_model_as_it_was(texts):
    model = fv.tiny("llama")
    before = model(torch.arange(3, 20)[None]).logits
    ranking = rerank(model, "b", texts, tokenizer=fv.tiny_tokenizer())
    assert sorted(ranking.order) == list(range(len(texts))) and len(ranking.scores) == len(texts)
    assert [ranking.scores[i] for i in ranking.order] == sorted(ranking.scores, reverse=True)
    assert torch.equal(model(torch.arange(3, 20)[None]).logits, before)


def test_bm25_is_that_of_a_case_by_hand():
    # Two documents of two words; "cat" in one: log(1 + 1.5 / 1.5) = log 2, times 2.2 / (1 + 1.2).
    assert bm25("cat", ["a cat", "a dog"]) == pytest.approx([0.6931, 0.0], abs=1e-4)


@pytest.mark.parametrize(
    "query,documents,says",
    [
        ("q", [], "no documents"),
        (" ", ["a"], "empty query"),
        ("q", ["a", "  "], "empty document"),
        ("q", ["word " * 300], "1024 positions"),
    ],
)
def test_what_cannot_be_ranked_gets_a_sentence(query, documents, says):
    with pytest.raises(FoveateError, match=says):
        rerank(fv.tiny("llama"), query, documents, tokenizer=fv.tiny_tokenizer())


def test_scores_of_other_units_get_a_sentence(model):
    with pytest.raises(FoveateError, match="1 layers of 4 heads"):
        ranked(model, heads=UnitScores("layer", torch.zeros(1, 1)))


def test_searches_hold_queries_that_are_not_in_other_passages():
    text = fv.load_text("prose").evaluation
    case = searches(text, 1)[0]
    right, words, following = case.asked[0]
    assert len(case.documents) == 20 and set(words.split()) <= set(case.documents[right].split())
    assert following not in case.documents[right]
    with pytest.raises(FoveateError, match="longer text"):
        searches("short", 1)


def test_the_claim_runs(monkeypatch):
    module = importlib.import_module("foveate.probes.rerank")
    monkeypatch.setattr(module, "CASES", 2)
    monkeypatch.setattr(module, "searches", lambda text, cases: searches(text, cases, documents=3, asked=2, words=12))
    text = fv.load_text("prose")
    finding = CLAIMS["rerank"]().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), text))
    assert finding.checks["two passes, and all documents are ranked"] and len(finding.metrics) == 21
