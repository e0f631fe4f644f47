"""The weights of single heads: what a head's query, key, value and output maps are, in any family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foveate.errors import FoveateError
from foveate.models.anatomy import Anatomy, LayerParts


@dataclass(frozen=True)
class HeadMaps:
    """The maps of one layer's heads, float32; biases are left out.

    Attributes:
        q: (head, head_dim, hidden); k, v: (head, head_dim, hidden), of the KV head that serves each query head.
        o: (head, hidden, head_dim).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def head_maps(parts: Anatomy, index: int) -> HeadMaps:
    """The maps of a layer's heads. A norm before the attention is not folded in: it differs from family to family.

    Raises:
        FoveateError: another module stands in the attention's place.

    Example:
        >>> import foveate as fv
        >>> maps = head_maps(fv.anatomy(fv.tiny("llama")), 0)
        >>> maps.q.shape, maps.o.shape
        (torch.Size([4, 16, 64]), torch.Size([4, 64, 16]))
    """
    layer = parts.layers[index]
    o = _weight(layer.o)
    q = k = v = None
    if layer.q is not None:
        q, k, v = (_weight(m) for m in (layer.q, layer.k, layer.v))
    elif layer.qkv is not None:
        fused = _weight(layer.qkv)
        if fused is not None and parts.qkv_layout == "heads":
            q, k, v = (t.flatten(0, 1) for t in fused.unflatten(0, (parts.heads, 3, -1)).unbind(1))
        elif fused is not None:
            widths = [n * parts.head_dim for n in (parts.heads, parts.kv_heads, parts.kv_heads)]
            q, k, v = fused.split(widths)
    if o is None or q is None or k is None or v is None:
        raise FoveateError(
            f"layer {index} has no plain maps of queries, keys and values, since another module stands in the "
            "attention's place: take a model that was not converted."
        )
    group = parts.heads // parts.kv_heads
    q = q.unflatten(0, (parts.heads, -1))
    k, v = (t.unflatten(0, (parts.kv_heads, -1)).repeat_interleave(group, 0) for t in (k, v))
    return HeadMaps(q, k, v, o.unflatten(1, (parts.heads, -1)).transpose(0, 1))


def folded_maps(parts: Anatomy, index: int) -> HeadMaps:
    """The maps of a layer's heads as they read and write the residual stream: with the norms' gains folded in.

    Queries, keys and values take the norm before the attention with them, outputs the norm after it where there is one
    (Gemma 2, OLMo 2). What is left out is the scale that a norm gives to each token.

    Raises:
        FoveateError: another module stands in the attention's place.

    Example:
        >>> import foveate as fv
        >>> folded_maps(fv.anatomy(fv.tiny("gemma2")), 0).q.shape
        torch.Size([4, 8, 64])
    """
    maps, (before, after) = head_maps(parts, index), norms_around(parts.layers[index])
    q, k, v = (folded(each, before) for each in (maps.q, maps.k, maps.v))
    o = maps.o if after is None else _gain(after, maps.q)[:, None] * maps.o
    return HeadMaps(q, k, v, o)


def folded(weight: Tensor, norm: nn.Module | None) -> Tensor:
    """A map of what a norm puts out, (..., hidden), as a map of what goes into the norm, but for each token's scale.

    Example:
        >>> norm = nn.LayerNorm(4)
        >>> folded(torch.ones(1, 4), norm)              # all that a layer norm lets through sums to zero
        tensor([[0., 0., 0., 0.]])
    """
    if norm is None:
        return weight
    weight = weight * _gain(norm, weight)
    return weight - weight.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else weight


@torch.no_grad()
def _gain(norm: nn.Module, like: Tensor) -> Tensor:
    """What a norm multiplies each channel by, (hidden,): seen from outside, since some families add 1 to the weight."""
    parameter = next(norm.parameters(), like)
    signs = torch.ones(_width(norm, like), device=parameter.device, dtype=torch.float32)
    signs[1::2] = -1  # a mean of 0 and a scale of 1
    x = signs.to(parameter.dtype)
    return (signs * (norm(x[None])[0].float() - norm(-x[None])[0].float()) / 2).to(like.device)


def _width(norm: nn.Module, like: Tensor) -> int:
    """The number of channels that a norm works on; of one without weights, that of the map next to it."""
    weight = next(norm.parameters(), None)
    return like.shape[-1] if weight is None else weight.shape[0]


def norms_around(layer: LayerParts) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms on a layer's residual stream before its attention, and on what the attention puts out."""
    after = layer.norms.get("post_attention_layernorm") if "post_feedforward_layernorm" in layer.norms else None
    path, first = next(iter(layer.norms.items()))
    late = path.startswith("post") or not getattr(layer.module, "do_layer_norm_before", True)  # OLMo 2, OPT-350m
    return None if late else first, after


def _weight(module: nn.Module | None) -> Tensor | None:
    """The weight as (out, in), float32, without gradient."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    return (weight.T if isinstance(module, Conv1D) else weight).detach().float()


def require_plain_widths(who: str, parts: Anatomy) -> None:
    """Raise FoveateError where the embedding or the head has another width than the layers (OPT-350m)."""
    widths = (next(parts.embedding.parameters()).shape[-1], next(parts.head.parameters()).shape[-1])
    if widths != (parts.hidden, parts.hidden):
        raise FoveateError(
            f"{who}: this model's embedding and head have {widths[0]} and {widths[1]} channels, and its layers have "
            f"{parts.hidden}: what lies between can't be read through the head. Leave this probe out."
        )


def require_plain_queries(who: str, parts: Anatomy) -> None:
    """Raise FoveateError where queries and keys pass a norm of their own (Qwen3, Gemma 3, OLMo 2)."""
    if any(hasattr(layer.attention, "k_norm") for layer in parts.layers):
        raise FoveateError(
            f"{who}: queries and keys of this {parts.family} model pass a norm, which is not read here, so that scores "
            "would be of other keys than the model uses: take a model without, such as a Llama or Qwen2."
        )
