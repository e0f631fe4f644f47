"""Rotary positions: keys and queries moved from where they stand."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(key: Tensor, shift: Tensor, inv_freq: Tensor) -> Tensor:
    """Move rotary keys by `shift` positions: rotations add up, R(shift) R(position) = R(position + shift).

    Args:
        key: (batch, kv_head, entry, head_dim), already rotated to some position.
        shift: (batch, kv_head, entry), int.
        inv_freq: (rotary_dim / 2,): radians a position, for each pair of dimensions; the rest of the head is left.

    Source: RoFormer: Enhanced Transformer with Rotary Position Embedding (2021), section 3.2.
    """
    half = inv_freq.shape[0]
    exact = torch.promote_types(key.dtype, torch.float32)
    angle = shift[..., None].to(exact) * inv_freq.to(key.device, exact)
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = key[..., :half].to(exact), key[..., half : 2 * half].to(exact), key[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(key.dtype), (b * cos + a * sin).to(key.dtype), rest], dim=-1)
