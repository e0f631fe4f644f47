"""Circuits: the maps of single heads are what the model's own modules do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.anatomy import anatomy
from foveate.models.circuits import head_maps, require_plain_queries, require_plain_widths
from foveate.models.patching import Site, recorded
from foveate.models.tiny import TINY_FAMILIES

IDS = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(0))


def without_biases(model):
    """Biases, which head maps leave out, are random in no tiny model: where there are any, they are set to zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and any(part in name for part in ("attn", "attention")):
                parameter.zero_()
    return model


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("layer", [0, 3])
def test_maps_of_a_normed_state_are_the_modules_own_projections(family, layer):
    model = without_biases(fv.tiny(family))
    parts = anatomy(model)
    attention, normed = parts.layers[layer].attention, []

    def note(module, args, kwargs):
        normed.append((args[0] if args else kwargs["hidden_states"])[0].detach())

    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
    group = parts.heads // parts.kv_heads
    heads = range(parts.heads)
    sites = {
        "q": [Site("query", layer, head) for head in heads],
        "k": [Site("key", layer, head // group) for head in heads],
        "v": [Site("value", layer, head // group) for head in heads],
        "o": [Site("head", layer, head) for head in heads],
    }
    every = [Site("attention", layer), *(site for named in sites.values() for site in named)]
    with torch.no_grad(), recorded(model, every) as values:
        model(IDS, use_cache=False)
    handle.remove()
    maps = head_maps(parts, layer)
    for name in "qkv":
        for head in heads:
            made = normed[0] @ getattr(maps, name)[head].T
            torch.testing.assert_close(made, values[sites[name][head]][0])
    summed = sum(values[sites["o"][head]][0] @ maps.o[head].T for head in heads)
    torch.testing.assert_close(summed, values[Site("attention", layer)][0])


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_shapes_are_as_they_should_be(family):
    parts = anatomy(fv.tiny(family))
    maps = head_maps(parts, 1)
    assert maps.q.shape == maps.k.shape == maps.v.shape == (parts.heads, parts.head_dim, parts.hidden)
    assert maps.o.shape == (parts.heads, parts.hidden, parts.head_dim)


def test_heads_of_a_group_share_keys_and_values():
    maps = head_maps(anatomy(fv.tiny("llama")), 0)  # four query heads, two KV heads
    assert torch.equal(maps.k[0], maps.k[1]) and torch.equal(maps.v[2], maps.v[3])
    assert not torch.allclose(maps.k[1], maps.k[2]) and not torch.allclose(maps.q[0], maps.q[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_maps_are_float32_and_without_gradient(family):
    maps = head_maps(anatomy(fv.tiny(family).to(torch.bfloat16)), 0)
    exact = head_maps(anatomy(fv.tiny(family)), 0)
    for name in "qkvo":
        assert getattr(maps, name).dtype == torch.float32
        assert not getattr(maps, name).requires_grad and not getattr(exact, name).requires_grad


def test_a_converted_layer_has_no_maps():
    model = fv.tiny("llama")
    model.model.layers[1].self_attn = nn.Identity()
    with pytest.raises(FoveateError, match="not converted"):
        head_maps(anatomy(model), 1)
    assert head_maps(anatomy(model), 0).q.shape == (4, 16, 64)


def test_a_map_without_a_weight_is_a_sentence():
    model = fv.tiny("gpt2")
    model.transformer.h[1].attn.c_attn = nn.Identity()
    with pytest.raises(FoveateError, match="not converted"):
        head_maps(anatomy(model), 1)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "olmo2"])
def test_norms_of_queries_and_keys_are_told(family):
    with pytest.raises(FoveateError, match="pass a norm"):
        require_plain_queries("channels", anatomy(fv.tiny(family)))
    require_plain_queries("channels", anatomy(fv.tiny("llama")))


def test_other_widths_at_the_ends_are_told():
    narrow = fv.tiny("opt", word_embed_proj_dim=32, do_layer_norm_before=False)
    with pytest.raises(FoveateError, match="32"):
        require_plain_widths("copying", anatomy(narrow))
    require_plain_widths("copying", anatomy(fv.tiny("opt")))
