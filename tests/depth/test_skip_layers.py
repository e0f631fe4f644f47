"""Depth: which layers run, the others leave, positions stay right, nothing is left behind; on every family."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.depth.base import layers_of
from foveate.depth.skip_layers import SkipLayers, spread
from foveate.errors import FoveateError
from foveate.methods import Target, apply
from foveate.models.surgery import Surgery, count_parameters, settle
from foveate.models.tiny import TINY_FAMILIES, tiny

IDS = torch.randint(3, 120, (1, 30), generator=torch.Generator().manual_seed(1))


def test_layers_are_spread_evenly_and_the_ends_run():
    for layers in range(3, 40):
        for skipped in range(1, layers - 1):
            out = spread(layers, skipped)
            assert len(set(out)) == skipped and out[0] >= 1 and out[-1] <= layers - 2
            gaps = [b - a for a, b in zip([0, *out], [*out, layers - 1], strict=True)]
            assert max(gaps[1:-1], default=1) - min(gaps[1:-1], default=1) <= 1
    assert spread(30, 4) == [4, 11, 18, 25]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_skipped_layers_do_not_run_and_pieces_give_the_same_as_the_whole(family):
    model = tiny(family, num_hidden_layers=4)
    ran = []
    parts = fv.anatomy(model)
    for layer in parts.layers:
        layer.attention.register_forward_hook(lambda *_, i=layer.index: ran.append(i))
        layer.down.register_forward_hook(lambda *_, i=layer.index: ran.append(i))
    full, parameters, layer = model(IDS).logits, count_parameters(model), count_parameters(parts.layers[2].module)
    assert SkipLayers(keep=0.75).plan(parts) == [0, 1, 3]
    expected = without(model, 2)
    with apply(model, "skip-layers:keep=0.75"):
        assert count_parameters(model) == parameters - layer
        ran.clear()
        whole = model(IDS, use_cache=True)
        assert ran == [0, 0, 1, 1, 3, 3]
        torch.testing.assert_close(whole.logits, expected)
        cache, pieces = None, []
        for piece in (IDS[:, :12], IDS[:, 12:20], IDS[:, 20:21], IDS[:, 21:]):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        ids = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        both = model.generate(torch.cat([IDS, IDS]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole.logits, full, atol=1e-2)
    assert ids.shape == (1, 34) and torch.equal(both, ids.expand(2, -1))
    assert torch.equal(model(IDS).logits, full)
    assert count_parameters(model) == parameters


def without(model, index):
    """Logits with a layer that hands on what it is given."""
    layer = fv.anatomy(model).layers[index].module
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    logits = model(IDS).logits
    del layer.forward
    return logits


def test_with_a_cache_policy_in_either_order():
    model = tiny("llama", num_hidden_layers=4)
    for recipe in ("skip-layers:keep=0.75+window:entries=8", "window:entries=8+skip-layers:keep=0.75"):
        with apply(model, recipe):
            out = model(IDS, use_cache=True)
            out = model(IDS[:, :1], past_key_values=out.past_key_values)
        held = [int(layer.held().max()) for layer in out.past_key_values.layers]
        assert held == [8, 8, 0, 8]


def test_keep_1_is_the_model_itself():
    model = tiny("llama")
    with apply(model, "skip-layers:keep=1"):
        assert torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("recipe,says", [("skip-layers:keep=0.1", "always run"), ("skip-layers:keep=0", "outside")])
def test_bad_fractions_get_a_sentence(recipe, says):
    with pytest.raises(FoveateError, match=says), apply(tiny("llama", num_hidden_layers=4), recipe):
        pass


def test_skipping_twice_counts_what_is_still_there():
    model = tiny("llama", num_hidden_layers=6)
    with apply(model, "skip-layers:keep=0.5"):
        assert layers_of(fv.anatomy(model)) == [0, 2, 5]
        with apply(model, "skip-layers:keep=0.7"):
            assert layers_of(fv.anatomy(model)) == [0, 5]
            assert model(IDS).logits.isfinite().all()
            with pytest.raises(FoveateError, match="1 of 2 layers"), apply(model, "skip-layers:keep=0.5"):
                pass
        assert layers_of(fv.anatomy(model)) == [0, 2, 5]
    assert layers_of(fv.anatomy(model)) == list(range(6))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_for_good_it_is_a_plain_model_with_fewer_layers(family):
    model = tiny(family, num_hidden_layers=6)
    method = SkipLayers(keep=0.5)
    with apply(model, method):
        expected = model(IDS).logits
    target = Target.of(model, calibration=IDS)
    method.change(target, Surgery())
    settle(model)
    assert [plan.describe() for plan in target.plans] == ["layer gone: 1, 3, 4"]
    assert len(fv.anatomy(model).layers) == model.config.num_hidden_layers == 3
    torch.testing.assert_close(model(IDS).logits, expected)
    ids = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)  # with the stock cache
    assert torch.equal(ids[0, 30:], model(ids).logits[0, 29:-1].argmax(-1))
