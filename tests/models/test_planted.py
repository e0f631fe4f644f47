"""Planted: the hand-written circuits do what they say, and nothing else happens."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.patching import ablated
from foveate.models.planted import BLOCKS, HIDDEN, INNER, POSITIONS, VOCAB, Planted


@torch.no_grad()
def attention(model, ids):
    """(layer, head, query, entry), of one text."""
    model.set_attn_implementation("eager")
    return torch.stack(model(ids, output_attentions=True).attentions)[:, 0]


@torch.no_grad()
def said(model, ids):
    """The most likely next token at each place of one text."""
    return model(ids).logits[0].argmax(-1).tolist()


def random_ids(length, seed=0):
    """Ordinary tokens, all different, so that what came before is one place only."""
    return torch.randperm(256, generator=torch.Generator().manual_seed(seed))[None, :length]


def test_blocks_do_not_overlap_and_fit():
    taken = [i for block in BLOCKS.values() for i in range(block.start, block.stop)]
    assert len(taken) == len(set(taken)) and max(taken) < HIDDEN
    sizes = {name: block.stop - block.start for name, block in BLOCKS.items()}
    assert sizes["token"] == sizes["previous"] == sizes["out"] == VOCAB and sizes["position"] == POSITIONS


def test_each_planted_head_attends_as_it_says():
    ids = random_ids(60).repeat(1, 2)
    maps, at = attention(fv.planted(), ids), torch.arange(120)
    assert maps[0, 1, at[1:], at[1:] - 1].min() > 0.99  # the token before
    assert maps[1, 3, at[60:], at[60:] - 59].min() > 0.99  # what came after it then
    assert maps[1, 0, :, 0].min() > 0.99  # the first token
    for entries in (at[60:], at[:60]):  # its own token, of which there are two; norms differ a little
        torch.testing.assert_close(maps[2, 2, at[60:], entries], torch.full((60,), 0.5), atol=0.05, rtol=0)


def test_all_other_heads_attend_evenly_and_give_nothing():
    model, ids = fv.planted(), random_ids(40)
    maps = attention(model, ids)
    planted = {(0, 1), (1, 3), (1, 0), (2, 2)}
    others = [(layer, head) for layer in range(3) for head in range(4) if (layer, head) not in planted]
    even = torch.ones(40, 40).tril() / torch.arange(1, 41)[:, None]
    for layer, head in others:
        torch.testing.assert_close(maps[layer, head], even)
    with torch.no_grad(), ablated(model, [*others, (1, 0)]):  # the sink gives nothing, either
        without = model(ids).logits
    torch.testing.assert_close(without, model(ids).logits)


def test_induction_continues_what_came_before():
    ids = random_ids(100).repeat(1, 2)
    model = fv.planted()
    assert said(model, ids)[100:-1] == ids[0, 101:].tolist()
    for needed in ((0, 1), (1, 3)):
        with ablated(model, [needed]):
            assert said(model, ids)[100:-1] != ids[0, 101:].tolist()


def test_the_neuron_knows_what_comes_after_f():
    tokenizer = fv.tiny_tokenizer()
    f, p = tokenizer("FP").input_ids
    assert said(fv.planted(), tokenizer("the F", return_tensors="pt").input_ids)[-1] == p
    assert said(fv.planted(), tokenizer("the G", return_tensors="pt").input_ids)[-1] != p
    assert f != p


def test_the_first_token_has_no_previous_one():
    model = Planted(layers=1).previous(0, 0).model()
    ids = random_ids(20)
    with torch.no_grad():
        after = model(ids, output_hidden_states=True)
        values = model.transformer.h[0](after.hidden_states[0])
    stream = (values[0] if isinstance(values, tuple) else values)[0][:, BLOCKS["previous"]]
    torch.testing.assert_close(stream[0], torch.zeros(VOCAB), atol=0.02, rtol=0)
    expected = torch.eye(VOCAB)[ids[0, :-1]]
    torch.testing.assert_close(stream[1:], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("shift", [-2, -1])
def test_a_shift_looks_that_far_back(shift):
    model = Planted(layers=1).head(0, 2, match=("position", "position"), shift=shift).model()
    maps, at = attention(model, random_ids(30)), torch.arange(2, 30)
    assert maps[0, 2, at, at + shift].min() > 0.99


def test_strength_scales_what_is_added():
    weak, strong = (
        Planted(layers=1).head(0, 0, match=("token", "token"), move=("token", "out"), strength=s).model()
        for s in (0.5, 1.0)
    )
    ids = random_ids(10)
    with torch.no_grad():
        a, b = weak(ids).logits[0, 4, ids[0, 4]], strong(ids).logits[0, 4, ids[0, 4]]
    assert float(a / b) == pytest.approx(0.5, abs=0.02)


def test_a_sharper_head_looks_harder():
    def kept(sharp):
        model = Planted(layers=1).head(0, 0, match=("token", "token"), sharp=sharp).model()
        return float(attention(model, random_ids(50))[0, 0, 49, 49])

    assert kept(0.0) == pytest.approx(1 / 50) and kept(4.0) < kept(24.0)
    # A match has the logit that was asked for, and others have about none: e^4 against 49 ones.
    assert kept(4.0) == pytest.approx(torch.tensor(4.0).exp().item() / (torch.tensor(4.0).exp().item() + 49), abs=0.02)


def test_a_sink_rests_where_it_is_told():
    maps = attention(Planted(layers=1).sink(0, 1, position=3).model(), random_ids(20))
    assert maps[0, 1, 3:, 3].min() > 0.99


def test_a_neuron_fires_only_where_all_is_there():
    model = Planted(layers=1).neuron(0, when={"token": 70, "position": 2}, write={"out": 80}).model()
    with torch.no_grad():
        out = model(torch.tensor([[70, 5, 70, 70, 6]])).logits[0, :, 80]
    assert out[2] > 10 and out[[0, 1, 3, 4]].abs().max() < 0.1


def test_an_empty_model_prefers_no_token():
    with torch.no_grad():
        out = Planted().model()(random_ids(10)).logits
    assert out.std(-1).max() < 1e-5


def test_sentences():
    with pytest.raises(FoveateError, match="give 1, 2 or 4"):
        Planted(heads=5)
    full = Planted(layers=1)
    with pytest.raises(FoveateError, match=f"has {INNER} neurons"):
        for token in range(INNER + 1):
            full.neuron(0, when={"token": token % VOCAB}, write={"out": 0})


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Planted().model()
    assert torch.equal(torch.rand(3), expected)
