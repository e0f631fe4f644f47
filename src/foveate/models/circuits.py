"""The weights of single heads: what a head's query, key, value and output maps are, in any family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foveate.errors import FoveateError
from foveate.models.anatomy import Anatomy


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
    if layer.q is not None:
        q, k, v = (_weight(m) for m in (layer.q, layer.k, layer.v))
    elif layer.qkv is not None:
        fused = _weight(layer.qkv)
        if fused is not None and parts.qkv_layout == "heads":
            q, k, v = (t.flatten(0, 1) for t in fused.unflatten(0, (parts.heads, 3, -1)).unbind(1))
        elif fused is not None:
            widths = [n * parts.head_dim for n in (parts.heads, parts.kv_heads, parts.kv_heads)]
            q, k, v = fused.split(widths)
    if o is None or (layer.q is None and layer.qkv is None) or q is None or k is None or v is None:
        raise FoveateError(
            f"layer {index} has no plain maps of queries, keys and values, since another module stands in the "
            "attention's place: take a model that was not converted."
        )
    group = parts.heads // parts.kv_heads
    q = q.unflatten(0, (parts.heads, -1))
    k, v = (t.unflatten(0, (parts.kv_heads, -1)).repeat_interleave(group, 0) for t in (k, v))
    return HeadMaps(q, k, v, o.unflatten(1, (parts.heads, -1)).transpose(0, 1))


@torch.no_grad()
def _weight(module: nn.Module | None) -> Tensor | None:
    """The weight as (out, in), float32."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    return (weight.T if isinstance(module, Conv1D) else weight).float()
