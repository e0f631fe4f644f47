"""What token mixers are built from: convolutions over the last tokens, rotary positions, attention over a growing
cache or a window."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone.slots import State


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, n, heads * d) to (batch, n, heads, d)."""
    return x.unflatten(-1, (heads, -1))


class ShortConv(nn.Module):
    """A depthwise causal convolution: each channel mixes its last `size` tokens.

    It starts as "the token itself", so that a layer with one starts as a layer without.

    Args:
        width: channels.
        size: tokens.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.zeros(width, 1, size))
        with torch.no_grad():
            self.weight[:, :, -1] = 1.0
            self.weight[:, :, :-1] = 0.2 * torch.randn(width, 1, size - 1)

    def start(self, batch: int, like: Tensor) -> State:
        return {"conv": like.new_zeros(batch, self.size - 1, self.weight.shape[0])}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """(batch, n, width) to the same, and the last `size` - 1 tokens."""
        last = x.new_zeros(x.shape[0], self.size - 1, x.shape[2]) if state is None else state["conv"]
        held = torch.cat([last, x], 1)
        # Shifts and products: depthwise convolutions of so few tokens are slower, by far in bfloat16 on a CPU.
        n, weight = x.shape[1], self.weight.to(x.dtype)
        y = sum((held[:, i : i + n] * weight[:, 0, i] for i in range(1, self.size)), held[:, :n] * weight[:, 0, 0])
        return y, None if state is None else {"conv": held[:, held.shape[1] - self.size + 1 :].clone()}


def rotated(x: Tensor, start: Tensor | int = 0, base: float = 10_000.0) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864, equation 34; halves paired) on (batch, n, heads, d), d even.

    Args:
        start: the position of the first token, a number or (batch,).

    Example:
        >>> x = torch.randn(1, 5, 2, 8)
        >>> torch.allclose(rotated(x)[:, 3:], rotated(x[:, 3:], 3), atol=1e-6)
        True
    """
    n, half = x.shape[1], x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(start, Tensor):
        first = torch.arange(n, device=x.device, dtype=dtype)
        cos, sin = _turns(first + start.to(dtype)[:, None], half, base)
    else:
        cos, sin = _table(n, start, half, base, x.device, dtype)
    a, b = x.to(dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _turns(positions: Tensor, half: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of (batch, n) positions, (batch, n, 1, half) each."""
    rates = base ** (-torch.arange(half, device=positions.device, dtype=positions.dtype) / half)
    angles = positions[..., None, None] * rates
    return angles.cos(), angles.sin()


@torch.compiler.assume_constant_result
def _table(*key: Any) -> tuple[Tensor, Tensor]:
    """`_turns` of neighbouring positions: a constant to the compiler, which would else make cosines anew for each head
    of each layer, a quarter of a training step's time."""
    return _kept_table(*key)


@functools.lru_cache(maxsize=64)
def _kept_table(
    n: int, start: int, half: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.inference_mode(False):
        return _turns(torch.arange(start, start + n, device=device, dtype=dtype)[None], half, base)


def cached(state: State, keep: int | None = None, **new: Tensor) -> tuple[dict[str, Tensor], State]:
    """New entries after those held: what attention reads, and the state after it.

    Args:
        state: has each name of `new`, (batch, held, ...), and `seen`, (batch,), how many tokens went by.
        keep: entries that stay at most; None: all.
        new: (batch, n, ...) each.

    Returns:
        for each name (batch, held + n, ...), and the state with at most `keep` of them.
    """
    joined = {name: torch.cat([state[name], each], 1) for name, each in new.items()}
    n = next(iter(new.values())).shape[1]
    left = {
        name: each if keep is None or each.shape[1] <= keep else each[:, each.shape[1] - keep :].clone()
        for name, each in joined.items()
    }
    return joined, {**left, "seen": state["seen"] + n}


def visible(n: int, held: int, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """Which of `held` + n entries each of n new tokens sees, bool (n, held + n): those up to itself.

    Args:
        window: how many at most, itself among them; None: all.

    Example:
        >>> visible(2, 1, window=2).int().tolist()
        [[1, 1, 0], [0, 1, 1]]
    """
    i = torch.arange(held, held + n, device=device)[:, None]
    j = torch.arange(held + n, device=device)
    seen = j <= i
    return seen if window is None else seen & (j > i - window)


def attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None) -> Tensor:
    """Causal softmax attention; q are the last n of the tokens that k and v are of.

    Args:
        q: (batch, n, heads, d).
        k: (batch, held + n, kv_heads, d).
        v: (batch, held + n, kv_heads, e).
        window: how many entries a token sees at most, its own among them; None: all.

    Returns:
        (batch, n, heads, e).
    """
    n, held = q.shape[1], k.shape[1] - q.shape[1]
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is not None and n > 2 * window:
        near = min(held, window - 1)  # what is before these is seen by none
        k, v = (x[:, :, held - near :] for x in (k, v))
        out = _in_blocks(functional.pad(q, (0, 0, near, 0)), k, v, window, scale)[:, :, near:]
    elif (window is None or held + n <= window) and (held == 0 or n == 1):
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=held == 0 and n > 1, scale=scale, enable_gqa=grouped
        )
    else:
        seen = visible(n, held, window, q.device)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """Attention within a window, block by block: time and memory are linear in the length."""
    n = q.shape[2]
    pad = -n % window
    q, k, v = (functional.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, window)) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (torch.cat([functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], 3) for x in (k, v))
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    blocks = q.shape[2]
    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device)
    seen = (j > i) & (j <= i + window)
    first = seen & (j >= window)  # there is nothing before the first block
    mask = torch.cat([first[None], seen[None].expand(blocks - 1, -1, -1)]).unsqueeze(1)  # block, 1, window, 2 window
    # Blocks go into the batch, so that attention is called once.
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    mask = mask.repeat(len(q) // blocks, 1, 1, 1)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :n]


def linear(width: int, out: int, bias: bool = False) -> nn.Linear:
    """A linear map that starts small enough for deep stacks: normal, standard deviation 1 / sqrt(width)."""
    module = nn.Linear(width, out, bias=bias)
    nn.init.normal_(module.weight, std=1 / math.sqrt(width))
    if bias:
        nn.init.zeros_(module.bias)
    return module


def simple_rms_norm(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square, (..., width) to the same; sums in float32 at least.

    Example:
        >>> simple_rms_norm(torch.tensor([3.0, 3.0, -3.0]), 1e-6).round(decimals=4).tolist()
        [1.0, 1.0, -1.0]
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return functional.rms_norm(exact, x.shape[-1:], eps=eps).to(x.dtype)
