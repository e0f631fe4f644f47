"""One time-varying linear recurrence, which all mixers of the linear family are parameterisations of.

After "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks" (arXiv 2405.15731): S_t = A_t S_(t-1) + k_t v_t', y_t = S_t' q_t, with A_t diagonal.

On a GPU flash-linear-attention's kernels do it where `fast` says that they can; the PyTorch form here is what they are
held against, and what runs everywhere else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import fast

CHUNK = 64
"""Tokens that are worked on at once without a decay or with one a head."""
VECTOR_CHUNK = 8
"""The same with a decay a channel, where a pair of tokens costs a product a channel."""
GROUP = 16
"""Chunks, and groups of chunks, whose memories are carried on at once."""


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = S_t' q_t with S_t = diag(exp(decay_t)) S_(t-1) + k_t v_t', in time linear in the length.

    Args:
        q, k: (batch, n, heads, feature), any scaling included.
        v: (batch, n, heads, columns).
        decay: logarithms of what stays, finite, at most 0: None (all stays), (heads,) the same at every token,
            (batch, n, heads) one a token and head, or (batch, n, heads, feature) one a channel.
        memory: S before the first token, (batch, heads, feature, columns), float32 at least; None: zeros.

    Returns:
        y, (batch, n, heads, columns) in v's dtype, and S after the last token. Sums are in float32 at least. So are
        products, but for those of bfloat16 numbers (or under autocast) that a GPU's kernels do (see `fast`).

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 8, dtype=torch.double) for _ in range(3))
        >>> y, memory = recurrence(q, k, v)
        >>> slow, _ = recurrence_by_steps(q, k, v)
        >>> torch.allclose(y, slow), memory.shape
        (True, torch.Size([1, 2, 8, 8]))
    """
    if fast.takes(q, k, v):
        return fast.run(q, k, v, decay, memory, recurrence_in_pytorch)
    return recurrence_in_pytorch(q, k, v, decay, memory)


def recurrence_in_pytorch(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's operations, chunk by chunk, wherever it runs."""
    with torch.autocast(v.device.type, enabled=False):  # which would round every product
        return _in_chunks(q, k, v, decay, memory)


def recurrence_by_steps(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same, token by token: the definition, for tests."""
    dtype, batch, n, heads, feature = torch.promote_types(v.dtype, torch.float32), *k.shape
    memory = q.new_zeros(batch, heads, feature, v.shape[-1], dtype=dtype) if memory is None else memory.to(dtype)
    rows = []
    for t in range(n):
        if decay is not None:
            kept = (decay if decay.ndim == 1 else decay[:, t]).to(dtype).exp()
            kept = kept if kept.ndim == 3 else kept.unsqueeze(-1)
            memory = memory * kept[..., None]
        memory = memory + k[:, t].to(dtype).unsqueeze(-1) * v[:, t].to(dtype).unsqueeze(-2)
        rows.append((q[:, t].to(dtype).unsqueeze(-2) @ memory).squeeze(-2))
    return torch.stack(rows, 1).to(v.dtype), memory


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    constant = decay is not None and decay.ndim == 1
    if decay is not None and constant:
        decay = decay.expand(1, *k.shape[1:3])
    dtype, out_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # batch, heads, n, ...
    decay = None if decay is None else decay.to(dtype).transpose(1, 2)
    if memory is None:
        memory = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    memory = memory.to(dtype)
    if k.shape[2] == 1:
        if decay is not None:
            memory = memory * decay.exp().reshape(*decay.shape[:2], -1, 1)
        memory = memory + k.mT @ v
        y = q @ memory
    elif decay is None or decay.ndim == 3:
        y, memory = _scalar_chunks(q, k, v, decay, memory, constant)
    else:
        y, memory = _vector_chunks(q, k, v, decay, memory)
    return y.transpose(1, 2).to(out_dtype), memory


def _chunks(x: Tensor, size: int, at: int = 2) -> Tensor:
    """(..., n, ...) in chunks along a dimension, (..., chunks, size, ...); zeros at the end change nothing."""
    pad = [0, 0] * (x.ndim - at - 1) + [0, -x.shape[at] % size]
    return functional.pad(x, pad).unflatten(at, (-1, size))


def _scalar_chunks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, memory: Tensor, constant: bool
) -> tuple[Tensor, Tensor]:
    n = k.shape[2]
    size = min(n, CHUNK)
    q, k, v = (_chunks(x, size) for x in (q, k, v))
    near = q @ k.mT
    if decay is None:
        near = near.tril()
        states = torch.cat([memory.unsqueeze(2), k.mT @ v], 2).cumsum(2)
        before, memory = states[:, :, :-1], states[:, :, -1].clone()  # or all states would be kept with it
    else:
        fall = _chunks(decay, size).cumsum(-1)
        first = fall[:, :, :1] if constant else fall  # whose chunks are all alike, up to the zeros at the end
        near = near * _falls(first)
        added = (k * (fall[..., -1:] - fall).exp().unsqueeze(-1)).mT @ v
        q = q * fall.exp().unsqueeze(-1)
        before, memory = _carried(added.flatten(-2).unsqueeze(-2), fall[..., -1:], memory.flatten(-2).unsqueeze(-2))
        before, memory = (x.squeeze(-2).unflatten(-1, added.shape[-2:]) for x in (before, memory))
    y = near @ v + q @ before
    return y.flatten(2, 3)[:, :, :n], memory


def _vector_chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    n = k.shape[2]
    size = min(n, VECTOR_CHUNK)
    q, k, v = (_chunks(x, size) for x in (q, k, v))
    fall = _chunks(decay, size).cumsum(-2)
    near = (q.mT.unsqueeze(-1) * k.mT.unsqueeze(-2) * _falls(fall.mT)).sum(-3)  # feature, i, j: quicker than einsum
    added = (k * (fall[..., -1:, :] - fall).exp()).mT @ v
    before, memory = _carried(added, fall[..., -1, :], memory)
    y = near @ v + (q * fall.exp()) @ before
    return y.flatten(2, 3)[:, :, :n], memory


def _falls(fall: Tensor) -> Tensor:
    """What is left at i of what came at j, exp(fall_i - fall_j), 0 for later j; (..., size) to (..., size, size).

    Only differences are exponentiated, which are never above 0: the two factors alone would overflow.
    """
    size = fall.shape[-1]
    ahead = torch.ones(size, size, dtype=torch.bool, device=fall.device).triu(1)
    return (fall.unsqueeze(-1) - fall.unsqueeze(-2)).masked_fill(ahead, -torch.inf).exp()


def _carried(added: Tensor, kept: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The memories before each of `count` chunks, and after the last, in groups of groups: no loop over chunks.

    Args:
        added: what each chunk adds, (batch, heads, count, feature, columns).
        kept: the logarithm of what it leaves of the memory before it, (batch or 1, heads, count, feature).
        memory: before the first chunk, (batch, heads, feature, columns).
    """
    # Nothing is left below that anyway; without the bound sums of huge logarithms would swallow small ones after them.
    kept = kept.clamp_min(math.log(torch.finfo(kept.dtype).tiny))
    count = added.shape[2]
    if count == 1:
        return memory.unsqueeze(2), kept[:, :, 0].exp().unsqueeze(-1) * memory + added[:, :, 0]
    size = min(count, GROUP)
    added, kept = _chunks(added, size), _chunks(kept, size)  # batch, heads, groups, size, feature(, columns)
    fall = kept.cumsum(-2)
    total = ((fall[..., -1:, :] - fall).exp().unsqueeze(-1) * added).sum(3)
    first, memory = _carried(total, fall[..., -1, :], memory)  # before each group
    # Before chunk i of a group there are those before it, each as chunk i - 1 left it, and what was before the group.
    within = (_falls(fall.mT)[..., :-1, :-1] @ added[..., :-1, :, :].transpose(-3, -2)).transpose(-3, -2)
    before = torch.cat([torch.zeros_like(added[..., :1, :, :]), within], 3)
    since = functional.pad(fall[..., :-1, :], (0, 0, 1, 0))  # from the group's begin to chunk i's
    before = before + since.exp().unsqueeze(-1) * first.unsqueeze(3)
    return before.flatten(2, 3)[:, :, :count], memory
