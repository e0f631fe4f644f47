"""Dropping attention: planted idle sublayers are found, weights and cache shrink, positions stay right."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.methods import apply
from foveate.models.caches import cache_bytes, full_cache_bytes
from foveate.models.tiny import TINY_FAMILIES, tiny
from foveate.prune.drop_attention import DropAttention
from foveate.prune.statistics import sublayer_change

IDS = torch.randint(3, 120, (1, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("idle", [0, 2])
def test_the_sublayer_that_does_nothing_is_what_leaves(family, idle):
    model = tiny(family, num_hidden_layers=4)
    parts = fv.anatomy(model)
    with torch.no_grad():
        for parameter in parts.layers[idle].o.parameters():
            parameter.zero_()
    change = sublayer_change(model, IDS)["attention"]
    assert int(change.argmin()) == idle and abs(float(change[idle])) < 1e-5
    assert (change[[i for i in range(4) if i != idle]] > 1e-4).all()

    full, whole = model(IDS, use_cache=True), sum(p.numel() for p in model.parameters())
    layer = parts.layers[idle]  # norms that run for the attention alone leave with it
    norms = list(layer.norms.values())[: len(layer.norms) // 2]
    attention = sum(p.numel() for module in (layer.attention, *norms) for p in module.parameters())
    with apply(model, "drop-attention:keep=0.75", calibration=IDS):
        assert sum(p.numel() for p in model.parameters()) == whole - attention
        cache, pieces = None, []
        for piece in (IDS[:, :20], IDS[:, 20:21], IDS[:, 21:]):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        with apply(model, "h2o:entries=8"):
            ids = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    # A norm after the attention may have a bias of its own; none of these families has one there.
    torch.testing.assert_close(torch.cat(pieces, 1), full.logits, atol=1e-4, rtol=1e-4)
    assert cache_bytes(cache) < full_cache_bytes(model, 48)
    assert ids.shape == (1, 51)
    assert sum(p.numel() for p in model.parameters()) == whole
    torch.testing.assert_close(model(IDS).logits, full.logits)


def test_the_cosine_is_the_papers():
    model = tiny("llama")
    states = model(IDS, output_hidden_states=True).hidden_states[1]  # what goes into the second layer
    layer = model.model.layers[1]
    position = model.model.rotary_emb(states, torch.arange(48).unsqueeze(0))
    mask = torch.ones(48, 48).tril().log()[None, None]
    added = layer.self_attn(layer.input_layernorm(states), position_embeddings=position, attention_mask=mask)[0]
    expected = 1 - torch.cosine_similarity(states, states + added, dim=-1).mean()
    torch.testing.assert_close(sublayer_change(model, IDS)["attention"][1, 0], expected.detach(), atol=1e-5, rtol=1e-4)


def test_keep_1_scores_and_removes_nothing():
    model = tiny("llama")
    full = model(IDS).logits
    with apply(model, DropAttention(keep=1.0)):  # no calibration is given, and none is asked for
        assert torch.equal(model(IDS).logits, full)


def test_what_is_gone_is_not_dropped_again():
    model = tiny("llama", num_hidden_layers=4)
    with (
        apply(model, "drop-attention:keep=0.5", calibration=IDS),
        apply(model, "drop-attention:keep=0.5", calibration=IDS),
    ):
        assert sum(type(layer.self_attn).__name__ == "NoAttention" for layer in model.model.layers) == 3
    assert not any(type(layer.self_attn).__name__ == "NoAttention" for layer in model.model.layers)


def test_layers_that_are_skipped_are_not_scored():
    model = tiny("llama", num_hidden_layers=4)
    with apply(model, "skip-layers:keep=0.75"):
        assert sublayer_change(model, IDS)["attention"].isnan().flatten().tolist() == [False, False, True, False]
    with apply(model, "skip-layers:keep=0.75+drop-attention:keep=0.5", calibration=IDS):  # one left with its layer
        assert sum(type(layer.self_attn).__name__ == "NoAttention" for layer in model.model.layers) == 2
