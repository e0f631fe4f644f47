"""The selective scan: a diagonal recurrence whose step, input and output change from token to token, in linear time.

h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t and y_t = C_t' h_t, for each channel by itself. Here are its definition (a loop
over tokens), a form in plain PyTorch that works on all chunks of a text at once, and one Triton kernel each for forward
and backward, which never write the states of all tokens down: forward keeps the state before each chunk of tokens, and
backward makes a chunk's states anew. What Triton can't run, the plain form runs.

Source: Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023), arXiv 2312.00752: the recurrence
(equation 2; A discretised exactly, B by Euler's step, as the authors' code has it) and recomputation in place of memory
(section 3.3). How it is cut into chunks and programs is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.errors import FoveateError

try:  # the extra `cuda`; without it the plain form runs
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INTERPRETED = triton is not None and not isinstance(tl.sum, triton.JITFunction)
"""Whether Triton runs in its interpreter, on any device: TRITON_INTERPRET=1 was set before its first import."""

CHUNK = 16
"""Tokens that the kernels work on at once; forward keeps the states before each so many."""

ELEMENTS = 256
"""Channels times states of a program."""


def selective_scan(
    u: Tensor, step: Tensor, rates: Tensor, b: Tensor, c: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = C_t' h_t with h_t = exp(step_t A) h_(t-1) + step_t u_t B_t.

    Runs the Triton kernels where `available`, else the plain form.

    Args:
        u: what comes in, (batch, n, channels).
        step: dt, above 0, of that shape.
        rates: A, below 0, (channels, states).
        b, c: (batch, n, states), or (channels, states) where they are the same at all tokens.
        before: h before the first token, (batch, channels, states); None: zeros.

    Returns:
        y, (batch, n, channels), and h after the last token, in float32 at least; all sums are.

    Example:
        >>> u, step = torch.randn(1, 50, 4), torch.rand(1, 50, 4)
        >>> b, c = torch.randn(1, 50, 8), torch.randn(1, 50, 8)
        >>> y, last = selective_scan(u, step, -torch.ones(4, 8), b, c)
        >>> slow, _ = selective_scan_by_steps(u, step, -torch.ones(4, 8), b, c)
        >>> torch.allclose(y, slow, atol=1e-5), last.shape
        (True, torch.Size([1, 4, 8]))
    """
    u, step, rates, b, c, before = _exact(u, step, rates, b, c, before)
    if available(u, b, c):
        return selective_scan_triton(u, step, rates, b, c, before)
    return selective_scan_plain(u, step, rates, b, c, before)


def selective_scan_plain(
    u: Tensor, step: Tensor, rates: Tensor, b: Tensor, c: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The twin of the kernels in plain PyTorch: the same arguments, any device and dtype.

    The states of all tokens are written down: (batch, n, channels, states).
    """
    u, step, rates, b, c, before = _exact(u, step, rates, b, c, before)
    decay = (step.unsqueeze(-1) * rates).exp()
    states = linear_scan(decay, (step * u).unsqueeze(-1) * _each(b), before)
    return (states * _each(c)).sum(-1), states[:, -1].clone()  # or all states would be kept with the last


def selective_scan_by_steps(
    u: Tensor, step: Tensor, rates: Tensor, b: Tensor, c: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same, token by token: the definition, for tests."""
    u, step, rates, b, c, state = _exact(u, step, rates, b, c, before)
    rows = []
    for t in range(u.shape[1]):
        b_t, c_t = (x if x.ndim == 2 else x[:, t].unsqueeze(1) for x in (b, c))
        state = (step[:, t].unsqueeze(-1) * rates).exp() * state + (step[:, t] * u[:, t]).unsqueeze(-1) * b_t
        rows.append((state * c_t).sum(-1))
    return torch.stack(rows, 1), state


def linear_scan(decay: Tensor, added: Tensor, before: Tensor) -> Tensor:
    """h_t = decay_t h_(t-1) + added_t, elementwise, at all tokens.

    All chunks of a text are scanned at once, about sqrt(n) tokens each, then what one hands on to the next. Decays are
    only ever multiplied, so that nothing can overflow.

    Args:
        decay, added: (batch, n, ...); decays from 0 to 1.
        before: h before the first token, (batch, ...).

    Returns:
        h, (batch, n, ...).

    Example:
        >>> linear_scan(torch.full((1, 3), 0.5), torch.ones(1, 3), torch.zeros(1)).tolist()
        [[1.0, 1.5, 1.75]]
    """
    if added.shape[1] == 1:
        return decay * before.unsqueeze(1) + added
    states: Tensor = _LinearScan.apply(decay, added, before)  # type: ignore[no-untyped-call]
    return states


class _LinearScan(torch.autograd.Function):
    """The gradient of a linear recurrence is one too, backwards in time; so that only decays and states are kept."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor, before: Tensor) -> Tensor:
        n = added.shape[1]
        states = _scanned(_chunks(decay, n), _chunks(added, n), before).flatten(1, 2)[:, :n]
        ctx.save_for_backward(decay, states, before)
        return states

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, before = ctx.saved_tensors
        n = grad.shape[1]
        # g_t = grad_t + decay_(t+1) g_(t+1)
        through = _scanned(_chunks(decay[:, 1:], n), _chunks(grad, n), torch.zeros_like(before), back=True)
        through = through.flatten(1, 2)[:, :n]
        to_decay = through.clone()
        to_decay[:, 0].mul_(before)
        to_decay[:, 1:].mul_(states[:, :-1])
        return to_decay, through, through[:, 0] * decay[:, 0]


def _chunks(x: Tensor, n: int) -> Tensor:
    """A copy in chunks of about sqrt(n), (batch, chunks, size, ...), so that there are as many steps within chunks as
    from chunk to chunk; zeros after the end."""
    size = 1 << (n.bit_length() // 2)
    whole = x.new_empty(x.shape[0], n + -n % size, *x.shape[2:])
    whole[:, : x.shape[1]] = x
    whole[:, x.shape[1] :] = 0
    return whole.unflatten(1, (-1, size))


def _scanned(kept: Tensor, states: Tensor, before: Tensor, back: bool = False) -> Tensor:
    """The scan of chunks in place, where `states` holds what is added; `back`: from the last token to the first."""
    chunks, size = states.shape[1:3]
    step = -1 if back else 1
    tokens, order = (range(x)[::step] for x in (size, chunks))
    for t in tokens[1:]:
        states[:, :, t].addcmul_(kept[:, :, t], states[:, :, t - step])
        kept[:, :, t].mul_(kept[:, :, t - step])
    starts = [before]
    for chunk in order[:-1]:
        starts.append(torch.addcmul(states[:, chunk, tokens[-1]], kept[:, chunk, tokens[-1]], starts[-1]))
    return states.addcmul_(kept, torch.stack(starts[::step], 1).unsqueeze(2))


def _exact(
    u: Tensor, step: Tensor, rates: Tensor, b: Tensor, c: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All in float32 at least, and a state to begin with."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    if before is None:
        before = u.new_zeros(u.shape[0], *rates.shape)
    u, step, rates, b, c, before = (x.to(dtype) for x in (u, step, rates, b, c, before))
    return u, step, rates, b, c, before


def _each(x: Tensor) -> Tensor:
    """(batch, n, states) for all channels; (channels, states) as it is."""
    return x if x.ndim == 2 else x.unsqueeze(2)


def available(u: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether the kernels run on such tensors of themselves: Triton is there, float32 on a CUDA card of compute
    capability 8.0 or later, b and c of each token, and no graph is being compiled (the plain form fuses by itself).

    Example:
        >>> available(torch.zeros(1, 1, 4), torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))  # on the CPU
        False
    """
    if triton is None or not u.is_cuda or u.dtype != torch.float32 or b.ndim != 3 or c.ndim != 3:
        return False
    return not torch.compiler.is_compiling() and torch.cuda.get_device_capability(u.device) >= (8, 0)


def selective_scan_triton(
    u: Tensor, step: Tensor, rates: Tensor, b: Tensor, c: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by the Triton kernels: arguments as of `selective_scan`, all float32, b and c of each token.

    Raises:
        FoveateError: the kernels can't run on these tensors.

    Example:
        >>> selective_scan_triton(u, step, rates, b, c, before)  # doctest: +SKIP
    """
    if triton is None or not (u.is_cuda or INTERPRETED) or u.dtype != torch.float32 or b.ndim != 3 or c.ndim != 3:
        raise FoveateError(
            f"no selective scan by Triton for {u.dtype} on {u.device}: the kernels take float32 on a CUDA card, and B "
            "and C of each token. Call selective_scan_plain."
        )
    found: tuple[Tensor, Tensor] = _Kernels.apply(u, step, rates, b, c, before)  # type: ignore[no-untyped-call]
    return found


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        u, step, rates, b, c, before = (x.contiguous() for x in given)
        batch, n, channels = u.shape
        y, last = torch.empty_like(u), torch.empty_like(before)
        starts = u.new_empty(batch, triton.cdiv(n, CHUNK), *rates.shape)
        grid, sizes = _cut(batch, channels, rates.shape[1])
        with torch.cuda.device_of(u):
            _forward[grid](u, step, rates, b, c, before, y, last, starts, n, channels, rates.shape[1], **sizes)
        ctx.save_for_backward(u, step, rates, b, c, starts)
        return y, last

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        u, step, rates, b, c, starts = ctx.saved_tensors
        batch, n, channels = u.shape
        grid, sizes = _cut(batch, channels, rates.shape[1])
        grad_u, grad_step = torch.empty_like(u), torch.empty_like(step)
        grad_rates, grad_before = (u.new_empty(batch, *rates.shape) for _ in range(2))
        # B and C are shared by all channels: each program writes its own sum, so that the total is always the same.
        grad_b, grad_c = (u.new_empty(batch, grid[1], n, rates.shape[1]) for _ in range(2))
        with torch.cuda.device_of(u):
            _backward[grid](
                u,
                step,
                rates,
                b,
                c,
                starts,
                grad_y.contiguous(),
                grad_last.contiguous(),
                grad_u,
                grad_step,
                grad_rates,
                grad_b,
                grad_c,
                grad_before,
                n,
                channels,
                rates.shape[1],
                **sizes,
            )
        return grad_u, grad_step, grad_rates.sum(0), grad_b.sum(1), grad_c.sum(1), grad_before


def _cut(batch: int, channels: int, states: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, one program a text and block of channels, and the sizes that kernels are compiled for."""
    wide = triton.next_power_of_2(states)
    block = max(1, min(triton.next_power_of_2(channels), ELEMENTS // wide))
    return (batch, triton.cdiv(channels, block)), {"CHUNK": CHUNK, "BLOCK": block, "WIDE": wide}


if triton is not None:

    @triton.jit
    def _after(decay, added, next_decay, next_added):  # type: ignore[no-untyped-def]
        """Two steps of h -> decay h + added in one."""
        return next_decay * decay, next_decay * added + next_added

    @triton.jit
    def _forward(  # type: ignore[no-untyped-def]
        u,  # (batch, n, channels), all of them float32 and contiguous
        step,
        rates,  # (channels, states)
        b,  # (batch, n, states)
        c,
        before,  # (batch, channels, states)
        y,
        last,
        starts,  # (batch, chunks, channels, states)
        n,
        channels,
        states,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        """One program takes BLOCK channels of one text from its first chunk to its last."""
        text = tl.program_id(0).to(tl.int64)
        d, s, row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE), tl.arange(0, CHUNK)
        own = d[:, None] * states + s[None, :]
        there = (d[:, None] < channels) & (s[None, :] < states)
        rate = tl.load(rates + own, mask=there, other=0.0)
        state = tl.load(before + text * channels * states + own, mask=there, other=0.0)
        chunks = tl.cdiv(n, CHUNK)
        for chunk in range(chunks):
            tl.store(starts + (text * chunks + chunk) * channels * states + own, state, mask=there)
            t = chunk * CHUNK + row
            at = (text * n + t[:, None]) * channels + d[None, :]
            on = (t[:, None] < n) & (d[None, :] < channels)
            some, some_on = (text * n + t[:, None]) * states + s[None, :], (t[:, None] < n) & (s[None, :] < states)
            # After the end steps are 0: nothing decays, nothing is added.
            dt, x = tl.load(step + at, mask=on, other=0.0), tl.load(u + at, mask=on, other=0.0)
            b_t, c_t = tl.load(b + some, mask=some_on, other=0.0), tl.load(c + some, mask=some_on, other=0.0)
            decay = tl.exp(dt[:, :, None] * rate[None, :, :])
            added = (dt * x)[:, :, None] * b_t[:, None, :]
            kept, h = tl.associative_scan((decay, added), 0, _after)
            h += kept * state[None, :, :]
            tl.store(y + at, tl.sum(h * c_t[:, None, :], axis=2), mask=on)
            state = tl.sum(tl.where(row[:, None, None] == CHUNK - 1, h, 0.0), axis=0)
        tl.store(last + text * channels * states + own, state, mask=there)

    @triton.jit
    def _backward(  # type: ignore[no-untyped-def]
        u,
        step,
        rates,
        b,
        c,
        starts,
        grad_y,  # (batch, n, channels)
        grad_last,  # (batch, channels, states)
        grad_u,
        grad_step,
        grad_rates,  # (batch, channels, states): of each text
        grad_b,  # (batch, blocks, n, states): of each block of channels
        grad_c,
        grad_before,
        n,
        channels,
        states,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        """The same chunks from last to first: their states made anew, then the gradient's own recurrence
        g_t = C_t grad_y_t + exp(step_(t+1) A) g_(t+1)."""
        text = tl.program_id(0).to(tl.int64)
        part = text * tl.num_programs(1) + tl.program_id(1)
        d, s, row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE), tl.arange(0, CHUNK)
        own = d[:, None] * states + s[None, :]
        there = (d[:, None] < channels) & (s[None, :] < states)
        rate = tl.load(rates + own, mask=there, other=0.0)
        later = tl.load(grad_last + text * channels * states + own, mask=there, other=0.0)
        summed = tl.zeros([BLOCK, WIDE], dtype=tl.float32)
        chunks = tl.cdiv(n, CHUNK)
        for back in range(chunks):
            chunk = chunks - 1 - back
            state = tl.load(starts + (text * chunks + chunk) * channels * states + own, mask=there, other=0.0)
            t = chunk * CHUNK + row
            at = (text * n + t[:, None]) * channels + d[None, :]
            on = (t[:, None] < n) & (d[None, :] < channels)
            some, some_on = (text * n + t[:, None]) * states + s[None, :], (t[:, None] < n) & (s[None, :] < states)
            dt, x = tl.load(step + at, mask=on, other=0.0), tl.load(u + at, mask=on, other=0.0)
            b_t, c_t = tl.load(b + some, mask=some_on, other=0.0), tl.load(c + some, mask=some_on, other=0.0)
            decay = tl.exp(dt[:, :, None] * rate[None, :, :])
            added = (dt * x)[:, :, None] * b_t[:, None, :]
            kept, h = tl.associative_scan((decay, added), 0, _after)
            h += kept * state[None, :, :]

            dy = tl.load(grad_y + at, mask=on, other=0.0)
            next_on = (t[:, None] + 1 < n) & (d[None, :] < channels)
            next_dt = tl.load(step + at + channels, mask=next_on, other=0.0)
            next_decay = tl.exp(next_dt[:, :, None] * rate[None, :, :])
            kept, g = tl.associative_scan((next_decay, dy[:, :, None] * c_t[:, None, :]), 0, _after, reverse=True)
            g += kept * later[None, :, :]
            later = tl.sum(tl.where(row[:, None, None] == 0, g, 0.0), axis=0)

            places = (part * n + t[:, None]) * states + s[None, :]
            tl.store(grad_c + places, tl.sum(dy[:, :, None] * h, axis=1), mask=some_on)
            tl.store(grad_b + places, tl.sum(g * (dt * x)[:, :, None], axis=1), mask=some_on)
            taken = tl.sum(g * b_t[:, None, :], axis=2)
            power = g * (h - added)  # the gradient of step_t A, as h_t - added_t is what was left of h_(t-1)
            tl.store(grad_u + at, dt * taken, mask=on)
            tl.store(grad_step + at, x * taken + tl.sum(power * rate[None, :, :], axis=2), mask=on)
            summed += tl.sum(power * dt[:, :, None], axis=0)
        first = tl.load(step + text * n * channels + d, mask=d < channels, other=0.0)
        tl.store(grad_rates + text * channels * states + own, summed, mask=there)
        tl.store(grad_before + text * channels * states + own, tl.exp(first[:, None] * rate) * later, mask=there)
