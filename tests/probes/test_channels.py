"""Channels: the planted one is the clearest; without it there is no induction, without others there is."""

from __future__ import annotations

import math

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.anatomy import anatomy
from foveate.models.circuits import folded_maps, head_maps
from foveate.models.patching import Site, ablated, recorded
from foveate.models.planted import BLOCKS, Planted
from foveate.probes import Data
from foveate.probes.channels import Channels, Edit, Wiring, _log_chance, any_basis, edited, lists

FEW = (70, 80, 90)


@pytest.fixture(scope="module")
def narrow():
    """The planted circuit, but head 0.1 tells of three tokens only: its channel has three directions."""
    model = Planted(layers=2).previous(0, 1).head(1, 3, match=("token", "previous"), move=("token", "out")).model()
    values = model.transformer.h[0].attn.c_attn.weight
    with torch.no_grad():
        kept = values[[BLOCKS["token"].start + t for t in FEW], 2 * values.shape[0] :].clone()
        values[:, 2 * values.shape[0] :] = 0
        values[[BLOCKS["token"].start + t for t in FEW], 2 * values.shape[0] :] = kept
    return model


def continued(model):
    ids = torch.tensor([[a, b, 30, 30, 40, a] for a, b in ((70, 31), (80, 32), (90, 33))])
    with torch.no_grad():
        return (model(ids).logits[:, -1].argmax(-1) == torch.tensor([31, 32, 33])).tolist()


def test_the_planted_channel_is_the_clearest_and_the_only_one():
    model = fv.planted()
    reading = Channels().measure(model, Data.of(model, fv.tiny_tokenizer()))
    assert reading.panels[0].rows[0][:3] == ["0.1", "1.3", "key"]
    assert {tuple(row[:3]) for row in reading.panels[0].rows} == {("0.1", "1.3", "key")}
    assert {(r.role, r.layer, r.unit) for r in reading.roles} == {("sender", 0, 1), ("receiver", 1, 3)}


def test_without_the_channel_there_is_no_induction_and_without_any_other_there_is(narrow):
    wiring = Wiring(narrow, components=3)
    channel = wiring.strongest(1)[0]
    assert (channel.sender, channel.receiver, channel.through) == ((0, 1), (1, 3), "key")
    basis, hear = wiring.written[0][1], ((1, 3, "key"),)
    assert continued(narrow) == [True] * 3
    for receivers in (hear, ()):
        with edited(narrow, [Edit((0, 1), basis, 0.0, receivers)]):
            assert continued(narrow) == [False] * 3
        with edited(narrow, [Edit((0, 1), basis, 1.0, receivers)]):
            assert continued(narrow) == [True] * 3
        for seed in range(3):
            other = torch.linalg.qr(torch.randn(1280, 3, generator=torch.Generator().manual_seed(seed)))[0]
            with edited(narrow, [Edit((0, 1), other, 0.0, receivers)]):
                assert continued(narrow) == [True] * 3
    with edited(narrow, [Edit((0, 1), basis, 0.0, ((1, 3, "query"), (1, 3, "value"), (1, 2, "key")))]):
        assert continued(narrow) == [True] * 3  # they don't listen
    assert continued(narrow) == [True] * 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_taking_all_away_from_all_is_ablating_the_head(family):
    model, ids = fv.tiny(family), torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(head_maps(anatomy(model), 1).o[2])[0]
    with torch.no_grad(), edited(model, [Edit((1, 2), basis)]):
        ours = model(ids, use_cache=False).logits
    with torch.no_grad(), ablated(model, [(1, 2)]):
        theirs = model(ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_one_receiver_hears_is_what_it_would_hear_without_the_head():
    # Nothing stands between the attention of layer 0 and what layer 1 reads but the MLP, which is taken away too.
    model, ids = fv.tiny("llama"), torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    basis = torch.linalg.qr(head_maps(anatomy(model), 0).o[2])[0]
    sites = [Site("query", 1, 1), Site("query", 1, 2), Site("key", 1, 1)]
    heard = {}
    for name, receivers in (("all", ()), ("one", ((1, 1, "query"),)), ("key", ((1, 2, "key"), (1, 3, "key")))):
        with torch.no_grad(), edited(model, [Edit((0, 2), basis, 0.0, receivers)]), recorded(model, sites) as values:
            model(ids, use_cache=False)
        heard[name] = dict(values)
    with torch.no_grad(), recorded(model, sites) as values:
        model(ids, use_cache=False)
    torch.testing.assert_close(heard["one"][sites[0]], heard["all"][sites[0]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(heard["one"][sites[1]], values[sites[1]])
    # Two query heads of one KV head name the same key: it is changed once.
    torch.testing.assert_close(heard["key"][sites[2]], heard["all"][sites[2]], atol=1e-5, rtol=1e-4)


def test_scores_are_those_of_the_whole_maps():
    model = fv.tiny("llama")
    parts, wiring = anatomy(model), Wiring(model, components=4)
    a, b = folded_maps(parts, 0), folded_maps(parts, 2)
    left, size, _ = torch.linalg.svd(a.o[1] @ a.v[1])
    for way, reads in (("query", b.k[3].T @ b.q[3]), ("key", b.q[3].T @ b.k[3]), ("value", b.o[3] @ b.v[3])):
        expected = (reads @ left[:, :4]).square().sum(0) * parts.hidden / reads.square().sum()
        found = wiring.scores[2][way][3, 0, 1]
        torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=1e-3)
        best = wiring.of((0, 1), (2, 3), way)
        assert best[0].score == pytest.approx(float(found.max())) and len(best) == 4


def test_chance_is_bounded():
    powers = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    drawn = (torch.randn(200_000, 3, dtype=torch.float64).square() * powers).sum(-1)
    for score in (0.5, 2.0, 5.0, 8.0):
        bound = float(_log_chance(torch.tensor([[score]], dtype=torch.float64), powers))
        share = float((drawn >= score).double().mean())
        assert share <= math.exp(bound) * 1.05 + 1e-5
    assert bound < math.log(0.05)  # and says something


def test_lists_of_one_half_share_no_word_with_the_other():
    tokenizer = fv.tiny_tokenizer()
    words = []
    for half in (0, 1):
        ids, options = lists(tokenizer, 6, half)
        text = tokenizer.batch_decode(ids)
        assert all(each.startswith("On the table there are the ") for each in text)
        words.append({word.strip(",.") for each in text for word in each.split(".")[0].split()[5:]} - {"the", ""})
        for row, each in zip(options, text, strict=True):
            left = [w.strip(",.") for w in each.split(".")[0].split() if w.strip(",.") not in each.split(".")[1]]
            assert tokenizer.decode(row[:1]) in {w[0] for w in left}
    assert not words[0] & words[1]


def test_bad_input_is_a_sentence():
    model = fv.tiny("llama")
    basis = any_basis(model, (1, 0), 2, seed=0)
    with (
        pytest.raises(FoveateError, match="comes no later"),
        edited(model, [Edit((1, 0), basis, 0.0, ((1, 1, "key"),))]),
    ):
        pass
    with pytest.raises(FoveateError, match="has 64 channels"), edited(model, [Edit((1, 0), basis[:9])]):
        pass
    with pytest.raises(FoveateError, match="heads 0 to 3"), edited(model, [Edit((1, 7), basis)]):
        pass
    with (
        pytest.raises(FoveateError, match="norm after its attention"),
        edited(fv.tiny("gemma2"), [Edit((1, 0), basis)]),
    ):
        pass
    with pytest.raises(FoveateError, match="at least 1 of each"):
        Channels(components=0)
