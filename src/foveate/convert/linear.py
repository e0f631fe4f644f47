"""What the linear-attention techniques share: which layers are converted, and what a new attention takes over."""

from __future__ import annotations

from typing import Any

import torch

from foveate.convert.base import numbers
from foveate.errors import FoveateError
from foveate.methods import Target
from foveate.models.anatomy import Anatomy, LayerParts, anatomy
from foveate.models.surgery import has_attention, size_in, size_out
from foveate.portable.linear import LinearAttention

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose attention the portable module can stand in for: rotary positions, separate projections."""


def layers_to_convert(target: Target, layers: str, who: str) -> list[LayerParts]:
    """The layers of a model that a spec names and that attend.

    Args:
        target: the model.
        layers: `all`, `even`, `odd`, or numbers and ranges joined by `/`, such as `0-9/12/20-29`.
        who: the technique, for errors.

    Raises:
        FoveateError: a family that isn't known to it, a spec that can't be read, attention that another technique
            has replaced.
    """
    parts = anatomy(target.model)
    if parts.family not in FAMILIES:
        raise FoveateError(
            f"{who}: the attention of {parts.family} models can't be made linear here, only that of "
            f"{', '.join(FAMILIES)}: use one of these."
        )
    wanted = numbers(layers, len(parts.layers), who)
    found = [layer for layer in parts.layers if layer.index in wanted and has_attention(layer)]
    for layer in found:
        if layer.q is None:
            raise FoveateError(
                f"{who}: the attention of layer {layer.index} is a {type(layer.attention).__name__} already: apply one "
                "conversion a layer."
            )
    return found


def stand_in(cls: type[LinearAttention], layer: LayerParts, parts: Anatomy, **settings: Any) -> Any:
    """A portable attention with the sizes, projections and norms of the one it stands in for.

    Parameters of its own are on the meta device, to be made by the caller.
    """
    with torch.device("meta"):
        new = cls(**sizes(layer, parts), **settings)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        if hasattr(new, name):
            setattr(new, name, getattr(layer.attention, name))
    return new.train(layer.attention.training)


def path_of(layer: LayerParts, parts: Anatomy) -> str:
    """The path of a layer's attention, from the model."""
    inside = next(name for name, module in parts.model.named_modules() if module is layer.module)
    return f"{inside}.{layer.attention_name}"


def sizes(layer: LayerParts, parts: Anatomy) -> dict[str, Any]:
    """Settings of a portable attention that follow from the one it stands in for."""
    maps = {"q": layer.q, "k": layer.k, "v": layer.v, "o": layer.o}
    norm = getattr(layer.attention, "q_norm", None)
    return {
        "layer_idx": layer.index,
        "hidden": parts.hidden,
        "heads": size_in(layer.o) // parts.head_dim,
        "kv_heads": size_out(layer.k) // parts.head_dim,
        "head_dim": parts.head_dim,
        "biases": "".join(name for name, module in maps.items() if getattr(module, "bias", None) is not None),
        "norm_eps": None if norm is None else norm.variance_epsilon,
    }
