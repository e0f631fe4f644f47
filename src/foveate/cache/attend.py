"""Attention over a cache of any shape, and what each entry received of it: the plain PyTorch path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.models.rotation import rotate as rotate

BLOCK = 1 << 24
"""Attention weights held at a time when their column sums are wanted (64 MiB in float32)."""


def visible(query_positions: Tensor, key_positions: Tensor, valid: Tensor | None, sliding_window: int | None) -> Tensor:
    """Which entries each query may attend to: bool (batch, kv_head, query, entry).

    Args:
        query_positions: (batch, query), int: positions in the text.
        key_positions: (batch, kv_head, entry), int; -1 = an empty slot.
        valid: (batch, query), bool: False for padding; None = no padding. Padding sees everything, so that no row is
            empty; nobody reads what comes of it.
        sliding_window: the layer's own attention window, where it has one.
    """
    q, k = query_positions[:, None, :, None], key_positions[:, :, None, :]
    mask = (k >= 0) & (k <= q)
    if sliding_window is not None:
        mask &= q - k < sliding_window
    return mask if valid is None else mask | ~valid[:, None, :, None]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Grouped-query attention, out = softmax(q k^T * scaling) v, of (batch, head, query, head_dim).

    Args:
        query: (batch, head, query, head_dim).
        key, value: (batch, kv_head, entry, head_dim); head is a multiple of kv_head.
        mask: bool, broadcastable to (batch, kv_head, query, entry); None = every query sees every entry.
        causal: no mask is given, queries and entries are the same tokens, and each sees itself and those before.
        scaling: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2; None = as they are.
    """
    batch, heads, queries, dim = query.shape
    if softcap is not None:
        if causal:
            mask = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()
        return attend_and_receive(query, key, value, mask, None, scaling=scaling, softcap=softcap)[0]
    if causal:
        return scaled_dot_product_attention(
            query, key, value, is_causal=queries > 1, scale=scaling, enable_gqa=heads != key.shape[1]
        )
    # The query heads of a KV head become further queries, so that keys and values need no copies.
    group = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], group * queries, dim)
    if mask is not None and queries > 1:
        mask = mask.expand(-1, -1, queries, -1).repeat(1, 1, group, 1)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, queries, -1)  # not every backend gives it in one block


def attend_and_receive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    gain: Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As `attend`, and what each entry received: the attention weights summed over queries and grouped heads.

    `gain`, float32 (batch or 1, query), is what each query counts for (None = 1 each; 0 for padding). Weights are made
    for a block of queries at a time, so memory grows linearly with the entries.

    Returns:
        out (batch, head, query, head_dim); received (batch, kv_head, entry), float32.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, entries = key.shape[1], key.shape[2]
    q = query.reshape(batch, kv_heads, heads // kv_heads, queries, dim)
    k, v = key[:, :, None].transpose(-1, -2), value[:, :, None]
    exact = torch.promote_types(query.dtype, torch.float32)
    received = torch.zeros(batch, kv_heads, entries, dtype=torch.float32, device=query.device)
    outs = []
    step = max(1, BLOCK // (batch * heads * entries))
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        logits = (q[:, :, :, rows] @ k).to(exact) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            block = mask if mask.shape[-2] == 1 else mask[..., rows, :]
            logits = logits.masked_fill(~(block[:, :, None] if block.dim() == 4 else block), -torch.inf)
        weights = logits.softmax(dim=-1)
        outs.append(weights.to(value.dtype) @ v)
        if gain is not None:
            weights = weights * gain[:, None, None, rows, None]
        received += weights.sum(dim=(2, 3))
    return torch.cat(outs, dim=3).reshape(batch, heads, queries, -1), received
