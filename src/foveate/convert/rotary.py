"""Which attention can be converted by techniques that rebuild it around its rotary maps, and how a stand-in begins."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from foveate.errors import FoveateError
from foveate.models.anatomy import Anatomy, LayerParts
from foveate.models.attention import check_free
from foveate.portable.rotary import RotaryAttention, settings_like

M = TypeVar("M", bound=RotaryAttention)

ROTARY_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose attention `foveate.portable.rotary` can stand in for."""


def rotary_layers(who: str, parts: Anatomy) -> list[LayerParts]:
    """The layers whose attention is still the model's own.

    Raises:
        FoveateError: another family, heads that are rotated in part, no such layer, a cache policy in force already.
    """
    rotary = getattr(parts.model.config, "rope_parameters", None) or {}
    if parts.family not in ROTARY_FAMILIES or rotary.get("partial_rotary_factor", 1) != 1:
        raise FoveateError(
            f"{who}: the attention of this {parts.family} model was to be rebuilt, but that is known only for maps q, "
            f"k, v and o of their own and heads that are rotated whole: take a model of {', '.join(ROTARY_FAMILIES)}."
        )
    check_free(who, parts)
    layers = [layer for layer in parts.layers if layer.q is not None]
    if not layers:
        raise FoveateError(
            f"{who}: every attention of this model has been replaced already: apply {who} to the model as it was."
        )
    return layers


def stand_in(cls: type[M], model: PreTrainedModel, layer: LayerParts, **settings: Any) -> M:
    """A portable attention for a layer: the maps and norms that it keeps are the layer's own, not copies.

    What it has of its own is on the meta device, to be filled by `fill`.
    """
    with torch.device("meta"):
        new = cls(**settings_like(layer.attention, layer.sliding_window), **settings, config=model.config)
    own: Any = layer.attention
    for name, module in new.named_children():
        if hasattr(own, name):
            if name.endswith("_norm"):
                module.weight = own.get_submodule(name).weight
            else:
                setattr(new, name, own.get_submodule(name))
    return new.train(own.training)
