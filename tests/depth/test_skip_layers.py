"""Depth: which layers run, positions stay right, nothing is left behind; on every family."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.depth.skip_layers import SkipLayers, spread
from foveate.errors import FoveateError
from foveate.methods import apply
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
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=layer.index: ran.append(i)) for layer in parts.layers if layer.mlp
    ]
    full = model(IDS).logits
    with apply(model, "skip-layers:keep=0.75"):
        ran.clear()
        whole = model(IDS, use_cache=True)
        if hooks:
            assert ran == SkipLayers(keep=0.75).plan(parts) == [0, 1, 3]
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
    assert all("forward" not in vars(layer.module) for layer in parts.layers)


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


def test_skipping_twice_gets_a_sentence():
    model = tiny("llama", num_hidden_layers=4)
    with (
        pytest.raises(FoveateError, match="replaced already"),
        apply(model, "skip-layers:keep=0.75+skip-layers:keep=0.75"),
    ):
        pass
    assert all("forward" not in vars(layer) for layer in model.model.layers)
