"""One time-varying linear recurrence, which all mixers of the linear family are parameterisations of.

After "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks" (arXiv 2405.15731): S_t = A_t S_(t-1) + k_t v_t', y_t = S_t' q_t, with A_t diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 64
"""Tokens that are worked on at once without a decay or with one a head."""
VECTOR_CHUNK = 16
"""The same with a decay a channel, whose work within a chunk is larger by its square."""


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = S_t' q_t with S_t = diag(exp(decay_t)) S_(t-1) + k_t v_t', in time linear in the length.

    Args:
        q, k: (batch, n, heads, feature), any scaling included.
        v: (batch, n, heads, columns).
        decay: logarithms of what stays, at most 0: None (all stays), (heads,) the same at every token,
            (batch, n, heads) one a token and head, or (batch, n, heads, feature) one a channel.
        memory: S before the first token, (batch, heads, feature, columns), float32 at least; None: zeros.

    Returns:
        y, (batch, n, heads, columns) in v's dtype, and S after the last token. Sums are in float32 at least.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 8, dtype=torch.double) for _ in range(3))
        >>> y, memory = recurrence(q, k, v)
        >>> slow, _ = recurrence_by_steps(q, k, v)
        >>> torch.allclose(y, slow), memory.shape
        (True, torch.Size([1, 2, 8, 8]))
    """
    if decay is not None and decay.ndim == 1:
        decay = decay.expand(*k.shape[:3])
    dtype, out_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # batch, heads, n, ...
    decay = None if decay is None else decay.to(dtype).transpose(1, 2)
    if memory is None:
        memory = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    memory = memory.to(dtype)
    if k.shape[2] == 1:
        if decay is not None:
            memory = memory * decay.exp().reshape(*k.shape[:2], -1, 1)
        memory = memory + k.mT @ v
        y = q @ memory
    elif decay is None or decay.ndim == 3:
        y, memory = _scalar_chunks(q, k, v, decay, memory)
    else:
        y, memory = _vector_chunks(q, k, v, decay, memory)
    return y.transpose(1, 2).to(out_dtype), memory


def recurrence_by_steps(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same, token by token: the definition, for tests."""
    dtype, batch, n, heads, feature = torch.promote_types(v.dtype, torch.float32), *k.shape
    memory = q.new_zeros(batch, heads, feature, v.shape[-1], dtype=dtype) if memory is None else memory.to(dtype)
    rows = []
    for t in range(n):
        if decay is not None:
            kept = decay if decay.ndim == 1 else decay[:, t]
            kept = kept.to(dtype).exp().expand(batch, heads, feature) if kept.ndim == 3 else kept.to(dtype).exp()[..., None]
            memory = memory * kept[..., None]
        memory = memory + k[:, t].to(dtype).unsqueeze(-1) * v[:, t].to(dtype).unsqueeze(-2)
        rows.append((q[:, t].to(dtype).unsqueeze(-2) @ memory).squeeze(-2))
    return torch.stack(rows, 1).to(v.dtype), memory


def _chunks(x: Tensor, size: int) -> Tensor:
    """(batch, heads, n, ...) in chunks, (batch, heads, chunks, size, ...); zeros at the end change nothing."""
    pad = [0, 0] * (x.ndim - 3) + [0, -x.shape[2] % size]
    return functional.pad(x, pad).unflatten(2, (-1, size))


def _scalar_chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    n = k.shape[2]
    size = min(n, CHUNK)
    q, k, v = (_chunks(x, size) for x in (q, k, v))
    near = q @ k.mT
    if decay is None:
        near = near.tril()
        added, kept = k.mT @ v, None
    else:
        fall = _chunks(decay, size).cumsum(-1)  # decay from j to i is exp(fall_i - fall_j)
        ahead = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        near = near * (fall.unsqueeze(-1) - fall.unsqueeze(-2)).masked_fill(ahead, -torch.inf).exp()
        added = (k * (fall[..., -1:] - fall).exp().unsqueeze(-1)).mT @ v
        q = q * fall.exp().unsqueeze(-1)
        kept = fall[..., -1].exp()[..., None, None]
    before, memory = _carried(added, kept, memory)
    y = near @ v + q @ before
    return y.flatten(2, 3)[:, :, :n], memory


def _vector_chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    n = k.shape[2]
    size = min(n, VECTOR_CHUNK)
    q, k, v = (_chunks(x, size) for x in (q, k, v))
    fall = _chunks(decay, size).cumsum(-2)
    # Only differences are exponentiated, which are never above 0: the two factors alone would overflow.
    ahead = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1).unsqueeze(-1)
    between = (fall.unsqueeze(-2) - fall.unsqueeze(-3)).masked_fill(ahead, -torch.inf).exp()  # .. i, j, feature
    near = torch.einsum("...if,...jf,...ijf->...ij", q, k, between)
    added = (k * (fall[..., -1:, :] - fall).exp()).mT @ v
    before, memory = _carried(added, fall[..., -1, :, None].exp(), memory)
    y = near @ v + (q * fall.exp()) @ before
    return y.flatten(2, 3)[:, :, :n], memory


def _carried(added: Tensor, kept: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The memory before each chunk, (batch, heads, chunks, feature, columns), and after the last one."""
    if kept is None:
        states = torch.cat([memory.unsqueeze(2), added], 2).cumsum(2)
        return states[:, :, :-1], states[:, :, -1].clone()  # or all states would be kept with it
    before = []
    for step in range(added.shape[2]):
        before.append(memory)
        memory = kept[:, :, step] * memory + added[:, :, step]
    return torch.stack(before, 2), memory
