"""Another attention in the place of a model's own, through transformers' attention interface."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from foveate.errors import FoveateError
from foveate.models.anatomy import Anatomy, anatomy

_NAME = "foveate"


@dataclass(frozen=True)
class Call:
    """One attention call.

    Attributes:
        layer: index of the layer.
        query: (batch, head, query, head_dim), with positions.
        key, value: (batch, kv_head, entry, head_dim): what the cache holds and what is new.
        mask: whatever mask the model made, or None; additive or bool, (batch, 1, query, entry).
        scaling: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2; None = as they are.
        sliding_window: the layer's own attention window, where it has one.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    sliding_window: int | None


def weights_of(call: Call, allowed: Tensor | None = None) -> Tensor:
    """The attention weights, float32 or wider (batch, kv_head, group, query, entry), all at once: for few queries.

    The queries are the last of the entries; there is no padding.

    Args:
        call: the attention call.
        allowed: bool, broadcastable to the weights: entries that may be attended to, of those before the query.
    """
    batch, heads, queries, dim = call.query.shape
    kv_heads, entries = call.key.shape[1:3]
    q = call.query.reshape(batch, kv_heads, heads // kv_heads, queries, dim)
    exact = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ call.key[:, :, None].transpose(-1, -2)).to(exact) * call.scaling
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    seen = visible_to(entries, queries, call.sliding_window, q.device)
    if allowed is not None:
        seen = seen & allowed
    return logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def visible_to(entries: int, queries: int, window: int | None, device: torch.device) -> Tensor:
    """Which entries the last `queries` of them see, bool (query, entry): none that follow, none beyond the window."""
    at = torch.arange(entries, device=device)
    distance = at[-queries:, None] - at
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


Attention = Callable[[Call], Tensor]
"""Gives the attention's output, (batch, head, query, head_dim)."""

_IN_PLACE: weakref.WeakKeyDictionary[nn.Module, tuple[int, Attention]] = weakref.WeakKeyDictionary()
"""For each attention module, its layer and what stands in: how the interface finds its way back."""


@contextmanager
def replaced_attention(model: PreTrainedModel, attention: Attention, who: str) -> Iterator[None]:
    """While in force, `attention` is what every layer of the model attends by.

    Args:
        model: the model.
        attention: called once a layer and forward.
        who: the name that an error sentence begins with.

    Raises:
        FoveateError: something else stands in already, or a layer was converted and holds other things than KV heads.
    """
    parts = anatomy(model)
    check_free(who, parts)
    for layer in parts.layers:
        if not getattr(layer.attention, "plain_entries", True):
            raise FoveateError(
                f"{who}: layer {layer.index} holds a {type(layer.attention).__name__}, whose cache has no keys and "
                f"values of each KV head, which {who} works on: apply {who} to a model that was not converted so."
            )
    before = model.config._attn_implementation
    for layer in parts.layers:
        _IN_PLACE[layer.attention] = (layer.index, attention)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for layer in parts.layers:
            _IN_PLACE.pop(layer.attention, None)


def check_free(who: str, parts: Anatomy) -> None:
    """Raise FoveateError where something stands in for the model's attention; `who` is who asks."""
    if any(layer.attention in _IN_PLACE for layer in parts.layers):
        raise FoveateError(
            f"{who}: another technique that replaces attention is in force on this model: leave its block first."
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: (batch, head, query, head_dim) in, (batch, query, head, head_dim) out."""
    layer, attention = _IN_PLACE[module]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention(Call(layer, query, key, value, attention_mask, scaling, softcap, sliding_window))
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
