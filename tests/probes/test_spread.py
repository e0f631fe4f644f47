"""Spread: numbers are those of a slow reference; a head that averages lets less through than one that moves."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.data.text import load_text
from foveate.models.patching import Site, recorded
from foveate.models.planted import Planted
from foveate.probes import Data, spread
from foveate.probes.spread import LongTextsCollapse, Spread
from foveate.tasks.base import Bench

TOKENIZER = fv.tiny_tokenizer()


def data(model, length=64, passages=2):
    return Data.of(model, TOKENIZER, length=length, passages=passages)


def test_a_head_that_moves_lets_all_through_one_that_averages_little_and_one_without_values_nothing():
    move = ("token", "out")
    model = Planted().previous(0, 1).head(1, 2, match=("one", "one"), move=move).model()
    scores = Spread().measure(model, data(model)).scores["high-frequency gain"].scores
    assert 0.9 < float(scores[0, 1]) < 1.1
    average = torch.ones(64, 64, dtype=torch.float64).tril() / torch.arange(1, 65)[:, None]
    given = torch.eye(260, dtype=torch.float64)[data(model).stream("prose", model)]  # a token's value is its channel

    def differing(x):
        return (x - x.mean(1, keepdim=True)).flatten(1).norm(dim=1)

    expected = (differing(average @ given) / differing(given)).mean()
    assert float(scores[1, 2]) == pytest.approx(float(expected), rel=0.02)  # norms differ a little from token to token
    assert float(scores[2].abs().max()) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_numbers_are_those_of_a_slow_reference(family, monkeypatch):
    monkeypatch.setattr("foveate.probes.watch.BLOCK", 700)  # several blocks of queries
    monkeypatch.setattr(spread, "LENGTHS", (16, 32))
    model = fv.tiny(family).double()
    given = data(model, 40)
    reading = Spread().measure(model, given)
    ids = given.stream("prose", model)
    model.set_attn_implementation("eager")
    sites = [Site("value", layer, head) for layer in range(4) for head in range(fv.anatomy(model).kv_heads)]
    residual = [Site("residual", layer) for layer in range(5)]
    with torch.no_grad(), recorded(model, sites + residual) as values:
        maps = model(ids, output_attentions=True).attentions
    group = 4 // fv.anatomy(model).kv_heads
    filtered = torch.eye(40, dtype=torch.float64) - 1 / 40
    for layer in range(4):
        for head in range(4):
            value = values[Site("value", layer, head // group)]
            gain = (filtered @ (maps[layer][:, head] @ value)).flatten(1).norm(dim=1)
            gain = (gain / (filtered @ value).flatten(1).norm(dim=1)).mean()
            assert float(reading.scores["high-frequency gain"].scores[layer, head]) == pytest.approx(float(gain), 1e-4)
    for n in (16, 40):  # a text of that length alone gives the same
        with torch.no_grad(), recorded(model, residual) as alone:
            model(ids[:, :n])
        states = alone[Site("residual", 4)]
        pairs = [
            float(torch.cosine_similarity(row[i], row[j], dim=0))
            for row in states
            for i in range(n)
            for j in range(n)
            if i != j
        ]
        metric = reading.metrics[f"cosine of tokens' states after the last layer, {n} tokens"]
        assert metric.value == pytest.approx(sum(pairs) / len(pairs), abs=1e-4)
        whole = torch.cosine_similarity(*states.mean(1), dim=0)
        assert reading.metrics[f"cosine of texts, {n} tokens"].value == pytest.approx(float(whole), abs=1e-4)


def test_lengths_stop_where_passages_do():
    model = fv.tiny("llama")
    reading = Spread().measure(model, data(model, 64))
    assert reading.setting["lengths"] == [32, 64]
    curve = reading.panels[0].series["layer 0"]
    assert [x for x, _ in curve] == [32, 64]
    assert Spread().measure(model, data(model, 20, 1)).setting["lengths"] == [20]


def test_the_claim_runs_and_leaves_the_callers_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(LongTextsCollapse, "passages", 2)
    model = fv.tiny("llama")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    finding = LongTextsCollapse().run(Bench(model, TOKENIZER, load_text("prose")))
    assert torch.equal(torch.rand(1), expected)
    assert len(finding.checks) == 4 and any(name.startswith("random weights") for name in finding.metrics)
