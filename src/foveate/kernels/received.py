"""Attention that also says what each key received of it: the column mass of the attention matrix, never held whole.

Cache policies rank entries by the attention that they received: summed over all queries (H2O), over a window of the
last ones (SnapKV), or with a factor that forgets old queries (A2SF). Fast attention never writes the matrix down, so
here its output and log-sum-exp come from PyTorch's own, and one Triton kernel makes the weights anew, a tile at a time,
as FlashAttention's backward pass does: P = exp(q k^T * scaling - lse). That takes half of the matrix products of
attention itself, and memory that grows linearly with the entries. What Triton can't run, the plain twin runs.

Sources: H2O: Heavy-Hitter Oracle (2023), arXiv 2306.14048 (the mass); SnapKV (2024), arXiv 2404.14469 (the window);
A2SF: Accumulative Attention Scoring with Forgetting Factor (2024), arXiv 2407.20485 (the factor);
FlashAttention (2022), arXiv 2205.14135, and FlashAttention-2 (2023), arXiv 2307.08691 (weights from the log-sum-exp).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.errors import FoveateError

try:  # the extra `cuda`; without it the twin runs
    import triton
    import triton.language as tl
    from triton.runtime.errors import OutOfResources
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

INTERPRETED = triton is not None and not isinstance(tl.sum, triton.JITFunction)
"""Whether Triton runs in its interpreter, on any device: TRITON_INTERPRET=1 was set before its first import."""

BLOCK = 1 << 22
"""Attention weights that the twin holds at a time (16 MiB in float32)."""

LOG2E = math.log2(math.e)


def attend_and_receive(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, forget: float = 1.0, last: int | None = None
) -> tuple[Tensor, Tensor]:
    """Causal grouped-query attention, and what each entry received: sum over i and the group of w_i * P[i, j].

    Runs PyTorch's fast attention and the Triton kernel where `available(query)`, else the plain twin.

    Args:
        query: (batch, head, new, head_dim): the last `new` of the entries. Query i sees entries 0 .. entry - new + i.
        key, value: (batch, kv_head, entry, head_dim); head is a multiple of kv_head; entry is at least new.
        scaling: factor on the logits.
        forget: in (0, 1], w_i = forget ** (new - 1 - i): 1 = the plain sum (H2O), below 1 old queries fade (A2SF).
        last: only the last so many queries count, w_i = 0 before (SnapKV's observation window); None = all.

    Returns:
        out: (batch, head, new, head_dim), as query.
        received: (batch, kv_head, entry), float32; without gradient.

    Raises:
        FoveateError: shapes that don't fit, or forget or last out of range.

    Example:
        >>> import torch
        >>> from foveate.kernels.received import attend_and_receive
        >>> query, key, value = torch.randn(1, 4, 3, 64), torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64)
        >>> out, received = attend_and_receive(query, key, value, scaling=0.125)
        >>> out.shape, received.shape
        (torch.Size([1, 4, 3, 64]), torch.Size([1, 2, 5]))
        >>> received.sum(dim=-1).round(decimals=4)  # 2 heads a group x 3 queries, each gives 1 in all
        tensor([[6., 6.]])
    """
    _check(query, key, value, forget, last)
    if not available(query):
        return attend_and_receive_reference(query, key, value, scaling=scaling, forget=forget, last=last)
    out, lse = _attend(query, key, value, scaling)
    return out, received_mass(query, key, lse, scaling=scaling, forget=forget, last=last)


def attend_and_receive_reference(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, forget: float = 1.0, last: int | None = None
) -> tuple[Tensor, Tensor]:
    """The plain twin of `attend_and_receive`: same arguments, any device, dtype and head_dim.

    Returns:
        out: (batch, head, new, head_dim), as query; received: (batch, kv_head, entry), float32; both are exact to
        float64 where the inputs are float64.

    Example:
        >>> import torch
        >>> from foveate.kernels.received import attend_and_receive_reference
        >>> x = torch.zeros(1, 1, 3, 4)  # equal logits: each query gives its entries equal shares
        >>> attend_and_receive_reference(x, x, x, scaling=1.0)[1]
        tensor([[[1.8333, 0.8333, 0.3333]]])
        >>> attend_and_receive_reference(x, x, x, scaling=1.0, last=1)[1]
        tensor([[[0.3333, 0.3333, 0.3333]]])
    """
    _check(query, key, value, forget, last)
    new, exact = query.shape[2], torch.promote_types(query.dtype, torch.float32)
    counted = new - _counted(new, forget, last)
    age = torch.arange(new - 1, -1, -1, device=query.device, dtype=exact)
    factor = torch.where(age < new - counted, forget**age, 0)
    received = torch.zeros(key.shape[:3], dtype=exact, device=query.device)
    outs = []
    for rows, logits in _blocks(query, key, scaling):
        weights, seen = logits.softmax(dim=-1), logits.shape[-1]
        outs.append(weights @ value[:, :, None, :seen].to(exact))
        if rows.stop > counted:
            received[..., :seen] += (weights.detach() * factor[rows, None]).sum(dim=(2, 3))
    return torch.cat(outs, dim=3).to(query.dtype).reshape(query.shape), received


def available(query: Tensor) -> bool:
    """Whether the kernel runs on such queries: Triton is there, float16 or bfloat16, head_dim 64 or 128, and a CUDA
    card of compute capability 8.0 or later (or Triton's interpreter, TRITON_INTERPRET=1 before the import).

    Example:
        >>> import torch
        >>> from foveate.kernels.received import available
        >>> available(torch.zeros(1, 1, 1, 64))  # float32: the twin's
        False
    """
    if triton is None or query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] not in (64, 128):
        return False
    if INTERPRETED:
        return True
    compiled = isinstance(_column_mass, triton.JITFunction)  # else the environment changed after Triton's import
    return compiled and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


@torch.no_grad()
def received_mass(
    query: Tensor, key: Tensor, lse: Tensor, *, scaling: float, forget: float = 1.0, last: int | None = None
) -> Tensor:
    """What each entry received, by the Triton kernel, where the log-sum-exp is known already.

    Args:
        query: (batch, head, new, head_dim), key: (batch, kv_head, entry, head_dim), scaling, forget, last: as in
            `attend_and_receive`, on a device and in a dtype for which `available(query)`.
        lse: (batch, head, new), float32: natural logarithm of each query's sum of exp(logits).

    Returns:
        received: (batch, kv_head, entry), float32.

    Raises:
        FoveateError: the kernel can't run on these tensors, or they don't fit.

    Example:
        >>> received_mass(query, key, lse, scaling=0.125)  # doctest: +SKIP
    """
    _check(query, key, key, forget, last)
    if not available(query):
        raise FoveateError(
            f"No received mass by Triton for {query.dtype} of head_dim {query.shape[-1]} on {query.device}: the kernel "
            "takes float16 or bfloat16 of head_dim 64 or 128 on a CUDA card. Call attend_and_receive_reference."
        )
    if lse.shape != query.shape[:3]:
        raise FoveateError(f"The log-sum-exp has shape {tuple(lse.shape)}: give {tuple(query.shape[:3])}, one a query.")
    rows = _counted(query.shape[2], forget, last)
    query, lse = query[:, :, -rows:], lse[:, :, -rows:]  # earlier queries give nothing, so the kernel never sees them
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    if INTERPRETED:
        query, key = query.float(), key.float()  # the interpreter's products take bfloat16's bits for integers
    # w * P = 2 ** (S * log2(e) - (lse * log2(e) - log2(w))): forgetting costs the kernel nothing.
    age = torch.arange(rows - 1, -1, -1, device=query.device, dtype=torch.float32)
    shift = lse.float() * LOG2E - age * math.log2(forget)
    with torch.cuda.device_of(query):
        return _launch(_config(query, key, shift, scaling), query, key, shift, scaling)


def _check(query: Tensor, key: Tensor, value: Tensor, forget: float, last: int | None) -> None:
    """Refuse what has no meaning."""
    if query.dim() != 4 or key.dim() != 4 or key.shape[:3] != value.shape[:3] or key.shape[-1] != query.shape[-1]:
        raise FoveateError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} don't fit: give "
            "(batch, head, new, head_dim) and twice (batch, kv_head, entry, head_dim)."
        )
    if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1]:
        raise FoveateError(
            f"{query.shape[1]} query heads of {query.shape[0]} texts can't share {key.shape[1]} KV heads of "
            f"{key.shape[0]}: give as many texts, and a multiple of the KV heads."
        )
    if value.shape[-1] != query.shape[-1]:
        raise FoveateError(f"Values of {value.shape[-1]} dimensions for queries of {query.shape[-1]}: give the same.")
    if not 1 <= query.shape[2] <= key.shape[2]:
        raise FoveateError(
            f"{query.shape[2]} new queries can't be the last of {key.shape[2]} entries: give at least 1, and all keys."
        )
    if not 0 < forget <= 1:
        raise FoveateError(f"forget={forget} is no forgetting factor: give a number above 0 and at most 1.")
    if last is not None and last < 1:
        raise FoveateError(f"last={last} counts no query: give 1 or more, or None for all.")


def _counted(new: int, forget: float, last: int | None) -> int:
    """How many of the last queries count: those within `last` whose factor is at least float32's smallest number."""
    rows = new if last is None else min(new, last)
    return rows if forget == 1 else min(rows, 1 + int(126 / -math.log2(forget)))


def _blocks(query: Tensor, key: Tensor, scaling: float) -> Iterator[tuple[slice, Tensor]]:
    """The logits of a block of queries at a time: its rows, and (batch, kv_head, group, row, entries it may see)."""
    batch, heads, new, dim = query.shape
    kv_heads, entries = key.shape[1], key.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)
    q = query.reshape(batch, kv_heads, heads // kv_heads, new, dim).to(exact) * scaling
    k = key[:, :, None].to(exact).transpose(-1, -2)
    step = max(1, BLOCK // (batch * heads * entries))
    for start in range(0, new, step):
        stop = min(start + step, new)
        logits = q[:, :, :, start:stop] @ k[..., : entries - new + stop]
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).triu(entries - new + start + 1)
        yield slice(start, stop), logits.masked_fill(hidden, -torch.inf)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """out (batch, head, new, head_dim) and its log-sum-exp (batch, head, new), float32, natural logarithm."""
    if not query.is_cuda:  # under the interpreter
        exact = torch.promote_types(query.dtype, torch.float32)
        logits = [block for _, block in _blocks(query, key, scaling)]
        outs = [b.softmax(dim=-1) @ value[:, :, None, : b.shape[-1]].to(exact) for b in logits]
        lse = torch.cat([b.logsumexp(dim=-1) for b in logits], dim=3)
        return torch.cat(outs, dim=3).to(query.dtype).reshape(query.shape), lse.reshape(query.shape[:3])
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    new, past = query.shape[2], key.shape[2] - query.shape[2]
    if past == 0 or new == 1:
        return _fused(query, key, value, scaling, causal=new > 1)
    # Backends disagree on where a mask that is not square is aligned, so the past and the new square run apart.
    before, lse_before = _fused(query, key[:, :, :past], value[:, :, :past], scaling, causal=False)
    among, lse_among = _fused(query, key[:, :, past:], value[:, :, past:], scaling, causal=True)
    share = torch.sigmoid(lse_among - lse_before)[..., None]  # the new ones' share of the sum of both
    out = before.float().lerp_(among.float(), share).to(query.dtype)
    return out, torch.logaddexp(lse_before, lse_among)


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's fast attention over a square causal block, or one without a mask; both take grouped heads as they are.

    cuDNN's is the faster from Hopper on. It plans anew for new shapes, and short ones (one token above all, where
    some versions leave out log-sum-exps of grouped heads: cudnn-frontend issue 1083) gain nothing by it.
    """
    long = min(query.shape[2], key.shape[2]) >= 64
    if long and torch.cuda.get_device_capability(query.device) >= (9, 0):
        grouped = query.shape[1] != key.shape[1]
        params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, causal, grouped)
        if torch.backends.cuda.can_use_cudnn_attention(params):
            attention = torch.ops.aten._scaled_dot_product_cudnn_attention
            out, lse = attention(query, key, value, None, True, 0.0, causal, False, scale=scaling)[:2]
            return out, lse.reshape(query.shape[:3])
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = attention(query, key, value, 0.0, causal, False, scale=scaling)[:2]
    return out, lse.reshape(query.shape[:3])


@dataclass(frozen=True)
class Config:
    """How the kernel is cut: what may differ in speed and never in the result (beyond rounding).

    Attributes:
        block_m: queries a step. block_n: keys that a program owns.
        keys_first: the tile is keys x queries, its sums taken each step; else queries x keys, summed once at the end.
        tma: queries come by Hopper's bulk tensor copies. poly: a quarter of the exponentials come from a polynomial.
        warps, stages, registers: as Triton's num_warps, num_stages, maxnreg.
    """

    block_m: int
    block_n: int
    keys_first: bool = False
    tma: bool = False
    poly: bool = False
    warps: int = 4
    stages: int = 2
    registers: int | None = None


CONFIGS = (
    Config(64, 128),
    Config(64, 128, tma=True, registers=168),
    Config(64, 128, tma=True, poly=True, registers=168),
    Config(128, 128, keys_first=True, tma=True),
    Config(128, 128, keys_first=True, tma=True, warps=8, registers=128),
    Config(128, 128, keys_first=True, tma=True, poly=True, warps=8, registers=128),
)
"""What is tried once for each kind of card and shape; the first runs everywhere. The registers let 3 programs of 4
warps, or 2 of 8, share a multiprocessor, so that one's exponentials run beside another's matrix product.
`benchmarks/received.py --sweep` tries more."""

_best: dict[tuple[Any, ...], Config] = {}


def _config(query: Tensor, key: Tensor, shift: Tensor, scaling: float) -> Config:
    """The fastest of CONFIGS for such tensors, measured when first asked for; for small work, simply the first."""
    rows, entries = query.shape[2], key.shape[2]
    if INTERPRETED or rows * entries < 1 << 22 or torch.cuda.is_current_stream_capturing():
        return CONFIGS[0]
    tma = _bulk(query)
    kind = (torch.cuda.get_device_name(query.device), query.dtype, query.shape[3], rows >= 1024, tma)
    if kind not in _best:
        times = {}
        for config in CONFIGS:
            if tma or not config.tma:
                try:
                    run = (config, query, key, shift, scaling)
                    times[config] = triton.testing.do_bench(
                        lambda run=run: _launch(*run), warmup=10, rep=40, return_mode="median"
                    )
                except OutOfResources:  # a smaller card's
                    continue
        _best[kind] = min(times, key=times.__getitem__)
    return _best[kind]


def _bulk(query: Tensor) -> bool:
    """Whether bulk tensor copies can read the queries: Hopper or later, and everything aligned to 16 bytes."""
    aligned = query.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in query.stride()[:3])
    return aligned and torch.cuda.get_device_capability(query.device) >= (9, 0)


def _launch(config: Config, query: Tensor, key: Tensor, shift: Tensor, scaling: float) -> Tensor:
    """Run the kernel. shift: (batch, head, row), float32: see `received_mass`; the rest as there."""
    batch, heads, rows, dim = query.shape
    kv_heads, entries = key.shape[1], key.shape[2]
    received = torch.empty(batch, kv_heads, entries, dtype=torch.float32, device=query.device)
    source = query
    if config.tma:
        source = TensorDescriptor(query, list(query.shape), list(query.stride()), [1, 1, config.block_m, dim])
    shift = torch.nn.functional.pad(shift, (-rows % config.block_m, 0), value=math.inf)  # whole blocks, from the end
    options = {} if config.registers is None else {"maxnreg": config.registers}
    # Programs start in the order of axis 0, then axis 1: the first keys, which all queries see, of every head first;
    # the last and lightest fill the gaps at the end.
    _column_mass[batch * kv_heads, triton.cdiv(entries, config.block_n)](
        source,
        key,
        shift,
        received,
        scaling * LOG2E,
        rows,
        entries,
        *query.stride()[:3],
        *key.stride()[:3],
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        KEYS_FIRST=config.keys_first,
        TMA=config.tma,
        POLY=config.poly,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,  # Triton's own default changes with its versions
        **options,
    )
    return received


if triton is not None:
    # Four exponentials at a time, three by the special function unit (16 a clock and multiprocessor, which would
    # take nearly as long as the matrix product) and the fourth by multiply-adds (128 a clock): 2^x = 2^n * 2^f with
    # n the nearest integer (adding 1.5 * 2^23 rounds to it, and leaves it in the low bits), 2^f by a minimax
    # polynomial of degree 3 on [-0.5, 0.5] (relative error 7.5e-5), and n added to the exponent's bits.
    _MIXED_EXP2 = tl.constexpr("""
    {
    .reg .f32 a, b, c, d, t, n;
    .reg .b32 e, p;
    ex2.approx.ftz.f32 a, $4;
    ex2.approx.ftz.f32 b, $5;
    ex2.approx.ftz.f32 c, $6;
    max.ftz.f32 d, $7, 0fC2FC0000;
    add.rn.ftz.f32 t, d, 0f4B400000;
    sub.rn.ftz.f32 n, t, 0f4B400000;
    sub.rn.ftz.f32 d, d, n;
    fma.rn.ftz.f32 n, d, 0f3D61FBB0, 0f3E786F0D;
    fma.rn.ftz.f32 n, n, d, 0f3F31798D;
    fma.rn.ftz.f32 n, n, d, 0f3F7FFB49;
    mov.b32 e, t;
    mov.b32 p, n;
    shl.b32 e, e, 23;
    add.s32 p, p, e;
    mov.f32 $0, a;
    mov.f32 $1, b;
    mov.f32 $2, c;
    mov.b32 $3, p;
    }
    """)

    @triton.jit
    def _logits(q, k, shift, scale, KEYS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
        """Logits in base 2 less their query's shift: one multiply-add an element."""
        if KEYS_FIRST:
            logits = tl.dot(k, tl.trans(q)) * scale - shift[None, :]
        else:
            logits = tl.dot(q, tl.trans(k)) * scale - shift[:, None]
        return logits

    @triton.jit
    def _add(mass, logits, KEYS_FIRST: tl.constexpr, POLY: tl.constexpr):  # type: ignore[no-untyped-def]
        """Add the tile's weights to the mass: to a column of sums, or to a tile that is summed at the end."""
        if POLY:
            weights = tl.inline_asm_elementwise(
                _MIXED_EXP2, "=f,=f,=f,=f,f,f,f,f", [logits], dtype=tl.float32, is_pure=True, pack=4
            )
        else:
            weights = tl.exp2(logits)
        if KEYS_FIRST:
            weights = tl.sum(weights, axis=1)
        return mass + weights

    @triton.jit
    def _column_mass(  # type: ignore[no-untyped-def]
        query,  # pointer to, or descriptor of, (batch, head, row, head_dim)
        key,  # (batch, kv_head, entry, head_dim)
        shift,  # (batch, head, slot), float32: log-sum-exp in base 2, less log2 of the query's factor
        received,  # (batch, kv_head, entry), float32, of one block
        scale,  # scaling * log2(e)
        rows,
        entries,
        q_batch,
        q_head,
        q_row,
        k_batch,
        k_head,
        k_row,
        KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        KEYS_FIRST: tl.constexpr,
        TMA: tl.constexpr,
        POLY: tl.constexpr,
    ):
        """One program owns BLOCK_N keys of one KV head, and writes their sums once."""
        lane = tl.program_id(0).to(tl.int64)
        batch, kv_head = lane // KV_HEADS, lane % KV_HEADS
        first = tl.program_id(1) * BLOCK_N
        m, n, d = tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N), tl.arange(0, DIM)
        long_row = tl.cast(q_row, tl.int64)  # long texts of many heads pass 2^31 elements

        # Blocks of queries are counted from the end, so that only those on the diagonal need masks. A query's slot is
        # its row + lead; the slots before the first row have an infinite shift, which makes weights of 0.
        past = entries - rows
        width = tl.cdiv(rows, BLOCK_M) * BLOCK_M
        lead = width - rows
        some = lead + tl.maximum(first - past, 0)  # from here on slots see some of these keys,
        all_ = lead + tl.minimum(tl.maximum(first + BLOCK_N - 1 - past, 0), rows)  # from here on all
        low, high = some // BLOCK_M * BLOCK_M, tl.cdiv(all_, BLOCK_M) * BLOCK_M

        k_tile = key + batch * k_batch + kv_head * k_head + n.to(tl.int64)[:, None] * k_row + d[None, :]
        k = tl.load(k_tile, mask=n[:, None] < entries, other=0.0)
        mass = tl.zeros([BLOCK_N], dtype=tl.float32) if KEYS_FIRST else tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

        for member in range(GROUP):
            head = kv_head * GROUP + member
            shifts = shift + (batch * KV_HEADS * GROUP + head) * width + m
            if not TMA:
                q_tile = query + batch * q_batch + head * q_head + (m[:, None] * q_row + d[None, :])
            for slot in range(low, high, BLOCK_M):
                s = tl.load(shifts + slot)
                row = slot - lead
                if TMA:
                    q = query.load([batch.to(tl.int32), head.to(tl.int32), row, 0]).reshape(BLOCK_M, DIM)
                else:
                    q = tl.load(q_tile + row * long_row, mask=row + m[:, None] >= 0, other=0.0)
                position = row + m + past
                seen = n[:, None] <= position[None, :] if KEYS_FIRST else n[None, :] <= position[:, None]
                logits = _logits(q, k, s, scale, KEYS_FIRST)
                mass = _add(mass, tl.where(seen, logits, float("-inf")), KEYS_FIRST, POLY)
            for slot in range(high, width, BLOCK_M):
                s = tl.load(shifts + slot)
                row = slot - lead
                if TMA:
                    q = query.load([batch.to(tl.int32), head.to(tl.int32), row, 0]).reshape(BLOCK_M, DIM)
                else:
                    q = tl.load(q_tile + row * long_row)
                mass = _add(mass, _logits(q, k, s, scale, KEYS_FIRST), KEYS_FIRST, POLY)

        if not KEYS_FIRST:
            mass = tl.sum(mass, axis=0)
        tl.store(received + lane * entries + n, mass, mask=n < entries)
