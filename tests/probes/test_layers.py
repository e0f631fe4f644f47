"""Layers: how much each changes, just as pruners count it; what adds nothing is found, and nothing else."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.models.planted import Planted
from foveate.models.tiny import TINY_FAMILIES
from foveate.probes import Data
from foveate.probes import layers as room
from foveate.probes.layers import Layers
from foveate.prune.statistics import sublayer_change

TOKENIZER = fv.tiny_tokenizer()  # one for all, so that the texts are encoded once


def read(model, passages=2):
    return Layers().measure(model, Data.of(model, TOKENIZER, length=48, passages=passages))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_scores_are_those_that_pruners_spend(family):
    model = fv.tiny(family)
    data = Data.of(model, TOKENIZER, length=48, passages=2)
    ids = torch.cat([data.stream(name, model) for name in ("prose", "code")])
    reading = read(model)
    for kind, expected in sublayer_change(model, ids).items():
        scores = reading.scores[kind]
        assert scores.kind == kind
        torch.testing.assert_close(scores.scores.float(), expected, atol=1e-6, rtol=1e-4)


def test_they_are_one_minus_the_cosine_of_hidden_states():
    model = fv.tiny("llama").double()
    data = Data.of(model, TOKENIZER, length=48, passages=1)
    found = torch.zeros(3)
    for name in ("prose", "code"):
        states = model(data.stream(name, model), output_hidden_states=True).hidden_states
        for at in range(3):  # of the last layer, the states have been through the norm
            found[at] += 1 - torch.cosine_similarity(states[at], states[at + 1], dim=-1).mean().item()
    scores = Layers().measure(model, data).scores["layer"].scores[:3, 0]
    torch.testing.assert_close(scores.float(), found / 2, atol=1e-5, rtol=1e-4)


def test_sublayers_that_add_nothing_are_found_and_no_others():
    model = Planted(layers=4).previous(1, 2).neuron(3, when={"one": 0}, write={"spare": 3}).model()
    reading = read(model)
    assert {(r.kind, r.layer) for r in reading.roles} == {
        *(("attention", at) for at in (0, 2, 3)),
        *(("mlp", at) for at in (0, 2)),  # the MLP of layer 1 takes back what the first token said of itself
    }
    assert all(r.role == "idle" for r in reading.roles)
    change = reading.scores["layer"].scores[:, 0]
    assert (change > 1e-4).tolist() == [False, True, False, True]


def test_in_half_precision_what_adds_nothing_is_idle_too():
    model = Planted(layers=1).neuron(0, when={"one": 0}, write={"spare": 3}).model().bfloat16()
    assert [(r.kind, r.layer) for r in read(model, passages=1).roles] == [("attention", 0)]


def test_what_a_pruner_took_is_not_there_and_no_role():
    model = fv.tiny("llama")
    with fv.apply(model, "drop-attention:keep=0.75", calibration=torch.arange(1, 65).unsqueeze(0)):
        reading = read(model)
    assert int(reading.scores["attention"].scores.isnan().sum()) == 1 and not reading.roles
    assert not reading.scores["layer"].scores.isnan().any()


def test_switched_off_is_what_dropping_does():
    model = fv.tiny("llama")
    ids = torch.randint(3, 250, (1, 65), generator=torch.Generator().manual_seed(0))
    change = sublayer_change(model, ids)["attention"][:, 0]
    off = room._nll(model, [ids], [("attention", int(change.argmin()))])
    with fv.apply(model, "drop-attention:keep=0.75", calibration=ids):
        torch.testing.assert_close(room._nll(model, [ids], []), off)
    assert off != room._nll(model, [ids], [])


def test_the_claim_runs():
    from foveate.claims import CLAIMS
    from foveate.data.text import load_text
    from foveate.tasks.base import Bench

    finding = CLAIMS["layers"]().run(Bench(fv.tiny("llama", num_hidden_layers=6), TOKENIZER, load_text()))
    assert len(finding.checks) == 6 and finding.metrics["over whole: mlp, random set 3"].value > 0
