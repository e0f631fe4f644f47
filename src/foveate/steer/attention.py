"""Attention weights, changed for some heads of a layer: the plain PyTorch path."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.errors import FoveateError
from foveate.models.anatomy import Anatomy
from foveate.steer.memory import Memory, cache_in

_NAME = "foveate-steer"
BLOCK = 1 << 24
"""Attention weights held at a time (64 MiB in float32)."""


@dataclass
class AttentionView:
    """What a technique sees of some heads' attention, for a block of queries.

    Attributes:
        layer: index of the layer.
        heads: int (head,): which heads of it these are.
        weights: (batch, head, query, entry), float32; each row sums to one.
        received: (batch, head, query, entry), float32: the mean attention that each entry received, over the queries
            that could see it, up to and with the query in question. No query looks ahead.
        seen: (batch or 1, head or 1, query, 1), int: entries that the query sees.
        first: (batch or 1, head or 1, 1, entry), bool: the text's first token.
    """

    layer: int
    heads: Tensor
    weights: Tensor
    received: Tensor
    seen: Tensor
    first: Tensor


Adjust = Callable[[AttentionView], Tensor]


@dataclass
class _Steering:
    """What is in force on one attention module, and what it found when it was called."""

    parts: Anatomy
    index: int
    heads: Tensor
    adjust: Adjust
    memory: Memory
    inner: str = ""
    cache: Cache | None = None


_STEERED: weakref.WeakKeyDictionary[nn.Module, _Steering] = weakref.WeakKeyDictionary()
"""What is in force on an attention module: how the attention interface finds its way back."""


@contextmanager
def steered_attention(
    who: str, parts: Anatomy, index: int, heads: Tensor, adjust: Adjust, memory: Memory
) -> Iterator[None]:
    """While in force, the weights of these heads of a layer, int (head,), are what `adjust` makes of them.

    The attention interface that is set, the model's own or a cache policy's, is changed only while the module runs, so
    that each does its part whatever the order in which they were put in force.
    """
    module: Any = parts.layers[index].attention
    if module in _STEERED:
        raise FoveateError(
            f"{who}: the weights of layer {index} are adjusted already: give one such technique a recipe."
        )
    steering = _STEERED[module] = _Steering(parts, index, heads, adjust, memory)

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        steering.inner, steering.cache = module.config._attn_implementation, cache_in(args, kwargs)
        module.config._attn_implementation = _NAME

    def leave(module: Any, args: Any, output: Any) -> None:
        module.config._attn_implementation = steering.inner
        steering.cache = None

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),  # also where the forward raises
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _STEERED.pop(module, None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface: (batch, head, query, head_dim) in, (batch, query, head, head_dim) out."""
    steering = _STEERED[module]
    steered = _steered(steering, query, key, value, attention_mask, **kwargs)
    home = module if hasattr(module, "eager_attention_forward") else sys.modules[type(module).__module__]
    eager = getattr(home, "eager_attention_forward", None)  # each family has its own, and converted attention
    inner: Any = ALL_ATTENTION_FUNCTIONS.get_interface(steering.inner, eager)  # type: ignore[arg-type]
    out = inner(module, query, key, value, attention_mask, **kwargs)[0]
    return out.index_copy(2, steering.heads.to(out.device), steered.transpose(1, 2).to(out.dtype)), None


AttentionInterface.register(_NAME, _attention)


def _steered(
    steering: _Steering,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """The outputs of the steered heads: (batch, head, query, head_dim)."""
    heads = steering.heads.to(query.device)
    group = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query[:, heads], key[:, heads // group], value[:, heads // group]
    batch, count, new, _ = q.shape
    slots = k.shape[2]
    positions, first = _positions(steering, slots, heads // group)
    visible = _visible(steering, mask, positions, new, sliding_window)
    valid = steering.memory.valid(query[:, 0, :, None])

    state = steering.memory.state(steering.cache, steering.index)
    total = q.new_zeros(batch, count, int(positions.max()) + 1, dtype=torch.float32)
    if "received" in state:
        before = state["received"]
        total[..., : before.shape[-1]] = before
    at = positions.clamp(min=0).expand(batch, count, -1)
    received = total.gather(-1, at)

    exact = torch.promote_types(q.dtype, torch.float32)
    outs = []
    step = max(1, BLOCK // (batch * count * slots))
    for start in range(0, new, step):
        rows = slice(start, start + step)
        logits = (q[:, :, rows] @ k.transpose(-1, -2)).to(exact) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        sees = visible[:, :, rows]
        weights = logits.masked_fill(~sees, torch.finfo(exact).min).softmax(dim=-1)
        counted = weights.detach().float()
        if valid is not None:
            counted = counted * valid[:, None, rows, None]
        sums = received[:, :, None] + counted.cumsum(2)
        ends = positions[..., slots - new :][..., rows]
        asked = (ends[..., None] - positions[:, :, None] + 1).clamp(min=1, max=sliding_window)
        view = AttentionView(
            steering.index, heads, weights, sums / asked, sees.sum(-1, keepdim=True).clamp(min=1), first[:, :, None]
        )
        outs.append(steering.adjust(view).to(v.dtype) @ v)
        received = sums[:, :, -1]
    live = (positions >= 0).expand_as(at)  # an empty slot has no position, and receives nothing
    state["received"] = total.scatter_add(-1, at, (received - total.gather(-1, at)) * live)
    return torch.cat(outs, dim=2)


def _visible(steering: _Steering, mask: Tensor | None, positions: Tensor, new: int, window: int | None) -> Tensor:
    """Which entries each query sees: bool (batch or 1, head or 1, query, entry)."""
    slots = positions.shape[-1]
    if mask is not None:  # the model made it
        mask = mask[..., :slots]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    k, q = positions[:, :, None], positions[:, :, slots - new :, None]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= q - k < window
    if steering.cache is None and steering.memory.mask is not None:
        seen = seen & steering.memory.mask[:, None, None].to(seen.device)
    return seen


def _positions(steering: _Steering, slots: int, kv_heads: Tensor) -> tuple[Tensor, Tensor]:
    """Where each entry stands in the text, int (batch or 1, head or 1, entry), -1 = an empty slot; and which is first.

    A cache policy's layers know; in the model's own cache, entries are columns, padding among them.
    """
    cache: Any = steering.cache
    held = None if cache is None else getattr(cache.layers[steering.index], "positions", None)
    if held is not None:
        if held.dim() == 1:  # slots, one KV head after another
            raise FoveateError(
                "a decode loop keeps entries in no order, and attention weights can't be adjusted there: decode with "
                "plain forwards or generate."
            )
        if cache.policy.renumbers(steering.parts):
            raise FoveateError(
                f"{cache.policy.name} numbers its entries by their place in the cache, and attention weights can't be "
                "adjusted there: give it positions=text."
            )
        at = held[:, kv_heads].long()
        return at, at == 0
    end = slots if cache is None else cache.get_seq_length(steering.index)
    at = torch.arange(end - slots, end, device=kv_heads.device)[None, None]
    mask = steering.memory.mask
    return at, at == (0 if mask is None else mask.to(at.device).long().argmax(-1)[:, None, None])
