"""In-context graph: a circuit that gathers neighbours draws the map, and what draws one at once does not count."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.planted import Planted
from foveate.probes import Data
from foveate.probes.in_context_graph import InContextGraph, adjacency, class_means, dirichlet, look, walk


def reading(model, **given):
    return InContextGraph(**given).measure(model, Data.of(model, fv.tiny_tokenizer()))


@pytest.fixture(scope="module")
def gathering():
    """Layer 1 adds, to each word, what came after it before: its neighbours, the more the longer the text."""
    return Planted(layers=3).previous(0, 1).head(1, 3, match=("token", "previous"), move=("token", "token")).model()


def test_a_map_that_grows_with_the_text_is_found_where_it_is_made(gathering):
    found = reading(gathering)
    assert {role.layer for role in found.roles} == {1, 2}  # layer 2 adds nothing and keeps it
    assert found.metrics["energy later, clearest layer"].value < 0.85
    assert found.metrics["coordinates told by two components (R2)"].low > 0.7
    assert abs(found.metrics["energy later, places shuffled"].value - 1) < 0.05


def test_the_word_before_mixed_in_draws_a_map_at_once_and_does_not_count():
    mixing = Planted(layers=2).head(1, 3, match=("position", "position"), shift=-1, move=("token", "token")).model()
    found = reading(mixing)
    assert found.roles == []
    data = Data.of(mixing, fv.tiny_tokenizer())
    seen = look(mixing, walk(data, 250, 0), 50, data)
    assert seen.energy[0, 1].max() < 0.85  # from the first window on


def test_without_a_map_in_the_text_there_is_none(gathering):
    data = Data.of(gathering, fv.tiny_tokenizer())
    looks = [look(gathering, walk(data, 250, i, anywhere=True), 50, data) for i in range(4)]
    energy = torch.stack([each.energy[0] for each in looks]).mean(0)
    assert (energy[1] > 0.93).all()


def test_the_energy_is_what_its_definition_says():
    means, there = torch.randn(16, 5, dtype=torch.float64), torch.ones(16, dtype=torch.bool)
    there[3] = False
    near, far = [], []
    for i in range(16):
        for j in range(16):
            if i != j and 3 not in (i, j):
                apart = float((means[i] - means[j]).square().sum())
                far.append(apart)
                if abs(i // 4 - j // 4) + abs(i % 4 - j % 4) == 1:
                    near.append(apart)
    expected = (sum(near) / len(near)) / (sum(far) / len(far))
    assert float(dirichlet(means, there, adjacency())) == pytest.approx(expected)
    assert float(dirichlet(torch.zeros(16, 5), there, adjacency())) == 1.0


def test_means_are_of_each_words_own_places():
    means, there = class_means(torch.tensor([[1.0], [3.0], [7.0]]).double(), torch.tensor([2, 2, 5]))
    assert means[2] == 2 and means[5] == 7 and there.nonzero()[:, 0].tolist() == [2, 5]


def test_a_walk_goes_from_neighbour_to_neighbour():
    data = Data.of(fv.tiny("llama"), fv.tiny_tokenizer())
    text = walk(data, 300, 1)
    assert adjacency()[text.nodes[:-1], text.nodes[1:]].all()
    assert torch.equal(text.ids[-300:], text.words[text.nodes]) and len(set(text.words.tolist())) == 16
    assert not torch.equal(walk(data, 300, 2).words, text.words)


def test_energies_are_those_of_the_models_own_hidden_states():
    model = fv.tiny("llama")
    data = Data.of(model, fv.tiny_tokenizer())
    text = walk(data, 120, 0)
    seen = look(model, text, 50, data)
    with torch.no_grad():
        states = model(text.ids[None], output_hidden_states=True).hidden_states
    for layer in range(3):  # the last is after the final norm there
        part = states[layer + 1][0, len(text.ids) - 120 :].double()
        expected = dirichlet(*class_means(part[51:101], text.nodes[51:101]), adjacency())
        assert float(seen.energy[0, layer, 1]) == pytest.approx(float(expected), abs=1e-5)


def test_what_cannot_be_says_so():
    with pytest.raises(FoveateError, match="at least two"):
        InContextGraph(steps=60)
    model = fv.tiny("gpt2", max_position_embeddings=90)
    with pytest.raises(FoveateError, match="window=44 or less"):
        InContextGraph().check(model, Data.of(model, fv.tiny_tokenizer()))
