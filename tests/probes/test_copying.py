"""Copying: planted heads that copy are found; the small matrices have the eigenvalues of the large ones."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.models.anatomy import anatomy
from foveate.models.circuits import folded, folded_maps
from foveate.models.planted import Planted
from foveate.probes import Data
from foveate.probes.copying import Circuits, Copying, WeightsTellWhoCopies, positive


def read(model):
    return Copying().measure(model, Data.of(model, fv.tiny_tokenizer()))


def test_the_planted_heads_are_found_and_nothing_else():
    reading = read(fv.planted())
    assert {(r.role, r.layer, r.unit) for r in reading.roles} == {("copying", 1, 3), ("copying", 2, 2)}
    assert reading.scores["copying"].scores[0].abs().max() < 0.01  # 0.1 writes where nothing is read into logits
    assert reading.scores["own token"].scores[2, 2] > 10


def test_a_head_that_lowers_what_it_looks_at_scores_minus_one():
    model = Planted(layers=1).head(0, 2, match=("token", "token"), move=("token", "out"), strength=-0.5).model()
    reading = read(model)
    assert reading.roles == []
    assert reading.scores["copying"].scores[0, 2] == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_scores_are_those_of_the_whole_circuit(family):
    """Against the map of all tokens to all logits, made in full."""
    model = fv.tiny(family)
    with torch.no_grad():  # norms that are no identity
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    parts, tokens = anatomy(model), Data.of(model, fv.tiny_tokenizer()).ordinary(model)
    reading = read(model)
    for layer, head in ((0, 1), (3, 2)):
        maps = folded_maps(parts, layer)
        embedded = parts.embedding.weight[tokens].float()
        raising = folded(parts.head.weight[tokens].float(), parts.final_norm)
        embedded, raising = embedded - embedded.mean(0), raising - raising.mean(0)
        whole = (embedded @ maps.v[head].T @ maps.o[head].T @ raising.T).detach()  # (token, logit)
        assert float(reading.scores["copying"].scores[layer, head]) == pytest.approx(
            float(positive(whole.double())), abs=2e-3
        )
        own = (whole.diagonal() / whole.square().mean(1).sqrt()).mean()
        assert float(reading.scores["own token"].scores[layer, head]) == pytest.approx(float(own), abs=1e-4)


def test_what_is_raised_by_a_given_token():
    model = fv.planted()
    parts, tokens = anatomy(model), torch.arange(256)
    circuits = Circuits(parts, tokens)
    maps = folded_maps(parts, 2)
    given = circuits.embedded[[7]] @ maps.v.transpose(1, 2)
    own = circuits.raised(given, maps.o, circuits.raising[[7]])
    other = circuits.raised(given, maps.o, circuits.raising[[9]])
    assert float(own[2, 0]) > 10 and abs(float(other[2, 0])) < 0.5
    assert own[0].tolist() == [0.0]  # a head that gives nothing raises nothing


def test_the_claim_runs():
    from foveate.data.text import load_text
    from foveate.tasks.base import Bench

    told = []
    finding = WeightsTellWhoCopies().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose"), told.append))
    assert finding.checks["the higher the score, the more a head raises what it looks at in text"] in (True, False)
    assert told == sorted(told) and told[-1] == pytest.approx(1)
