"""Minitron: the shape is regular and meets `keep`, and the scores are what activations say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate as fv
from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.models.anatomy import anatomy
from foveate.models.surgery import layer_parameters, unit_counts
from foveate.models.tiny import tiny
from foveate.prune.minitron import Minitron

IDS = torch.randint(3, 120, (1, 48), generator=torch.Generator().manual_seed(1))
MODEL = tiny("llama")


@given(
    keep=st.floats(0.5, 1, exclude_max=True),
    axes=st.sampled_from(["width", "channels", "hidden", "heads/channels", "depth/channels", "depth/heads/width"]),
)
def test_shares_meet_keep(keep, axes):
    shares = Minitron(keep=keep, axes=axes).shares(MODEL)
    attention, mlp = 12288, 24576
    kept = shares["layer"] * shares["hidden"] * (attention * shares["kv_head"] + mlp * shares["channel"]) / 36864
    assert kept == pytest.approx(keep, abs=0.02)
    assert {kind for kind, share in shares.items() if share < 1} <= set(Minitron(keep=keep, axes=axes).kinds)


@pytest.mark.parametrize("axes", ["width", "heads/channels", "depth/channels", "depth", "hidden"])
def test_the_shape_is_regular(axes):
    with apply(MODEL, f"minitron:keep=0.75,axes={axes}", calibration=IDS):
        for kind in ("kv_head", "channel"):
            counts = {count for count in unit_counts(MODEL, kind) if count}
            assert len(counts) == 1
        assert layer_parameters(MODEL) == pytest.approx(0.75 * 147968, rel=0.02)
        assert (anatomy(MODEL).hidden < 64) == (axes in ("width", "hidden"))
        assert (0 in unit_counts(MODEL, "layer")) == axes.startswith("depth")


def test_what_activations_say():
    """A channel, a KV head, a channel of the stream and a layer that are planted as idle score lowest."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] = 0
        model.model.layers[2].self_attn.v_proj.weight[:16] = 0
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[5] = 0
        model.model.norm.weight[5] = 0
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    scores = {score.kind: score.scores for score in Minitron(keep=0.5, axes="depth/heads/width").score(model, IDS)}
    assert list(scores) == ["layer", "kv_head", "channel", "hidden"]  # the order in which they are cut
    assert int(scores["layer"].argmin()) == 3 and int(scores["channel"][1].argmin()) == 7
    assert int(scores["kv_head"][2].argmin()) == 0 and int(scores["hidden"].argmin()) == 5
    with apply(model, "minitron:keep=0.75,axes=depth", calibration=IDS):
        assert unit_counts(model, "layer") == [1, 1, 1, 0]


def test_multiples_are_kept():
    with apply(MODEL, "minitron:keep=0.75,budget=uniform(multiple=8)", calibration=IDS):
        assert anatomy(MODEL).hidden % 8 == 0 and unit_counts(MODEL, "channel")[0] % 8 == 0


def test_what_cannot_be_met_is_said():
    with pytest.raises(FoveateError, match="no axis called 'length': "):
        Recipe.of("minitron:keep=0.5,axes=length")
    with pytest.raises(FoveateError, match="keeps all layers alike"):
        Recipe.of("minitron:keep=0.5,budget=global")
    heads = apply(MODEL, "minitron:keep=0.5,axes=heads", calibration=IDS)
    with pytest.raises(FoveateError, match="can't be met by the axes heads, which come to 0.83 at best"), heads:
        pass


def test_a_keep_that_one_axis_can_not_reach_is_said():
    for recipe in ("minitron:keep=0.7,axes=heads", "low-rank:keep=0.5,aware=false+minitron:keep=0.8"):
        asked = fv.apply(fv.tiny("llama"), recipe, calibration=torch.arange(3, 67).unsqueeze(0))
        with pytest.raises(FoveateError, match="axes"), asked:
            pass
