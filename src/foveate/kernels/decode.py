"""Decode attention over ragged caches: one query a sequence, and as many live entries as each KV head kept.

A cache that evicts by head holds 300 entries here and 30,000 there. A launch with one block a head would wait for the
longest; here all entries of all heads make one row of tiles, and every program takes an equal run of it (stream-K),
loading ahead across the heads in it. A run may end inside a head: then its programs leave partial softmaxes, and the
last of them to arrive merges these by log-sum-exp. Keys and values are read once for all query heads of a group. A
second launch adds what each entry received to its running score; without a score there is none.

Source: Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers (2024,
arXiv 2405.10480), sections 4.1 and 4.2; the merge is FlashAttention-2's (2023, arXiv 2307.08691), section 2.3.1.
"""

# No `from __future__ import annotations`: Triton reads the kernels' annotations as objects.

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from foveate.errors import FoveateError

try:
    import triton
    import triton.language as tl
except ImportError:  # optional: the twin needs only PyTorch
    triton = None

DIMS = (32, 64, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
LOG2E = 1.4426950408889634
SCORED = 4096  # weights that a scoring program takes: enough loads in flight to hide their latency


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the work is cut. Fixed before the call and the same for all lengths.

    Not found by triton.autotune: that times candidates at the first call, which inside a CUDA graph's capture is an
    error, and outside of it tunes for whatever lengths came first. `benchmarks/ragged_decode.py --sweep` measures.

    Attributes:
        block: entries a tile, a power of two, at least 16. Larger: fewer steps; smaller: finer balance.
        warps: warps a program.
        stages: depth of the pipeline that loads tiles ahead.
        programs_per_sm: runs that the tiles are cut into, for each multiprocessor; as many as fit at once in its
            shared memory, (stages - 1) * (block * 4 + 32) * head_dim bytes each.

    Example:
        >>> from foveate.kernels.decode import Tuning
        >>> Tuning(block=128, stages=2).programs_per_sm
        1
    """

    block: int = 64
    warps: int = 4
    stages: int = 4
    programs_per_sm: int = 1


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Memory for the parts of `ragged_decode`. Make it once with `allocate` and use it for every layer.

    Its size depends on shapes only, never on lengths.

    Attributes:
        maximum, total: (part, group), float32: largest logit in base 2, and sum of exponentials below it.
        weighted: (part, group, head_dim), float32: values weighted by these exponentials. A part is what one program
            saw of one region: program p and region r leave theirs at p + r, which no other pair shares, because from
            one part to the next either p or r grows.
        counters: (regions + 1,), int32: programs that have left their part of each region, and, last, the tiles in
            all. Zeros before the first call; every call leaves the regions' at zero. A call that was cut off does not.
        weights: (tile, group, block), float16: exponentials, kept for `received` as the three below; empty without it.
        tops: (tile, group), float32: the logit below which they are.
        places: (tile, 3), int64: the tile's first slot, its live entries, its region.
        levels: (regions, group), float32: log-sum-exp of all of a region's logits, in base 2.
        programs: runs that the tiles are cut into.
        tuning: how.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    counters: Tensor
    weights: Tensor
    tops: Tensor
    places: Tensor
    levels: Tensor
    programs: int
    tuning: Tuning

    @classmethod
    def allocate(
        cls,
        query: Tensor,
        keys: Tensor,
        offsets: Tensor,
        *,
        received: bool = False,
        tuning: Tuning | None = None,
        programs: int | None = None,
    ) -> "Workspace":
        """Memory for calls with tensors of these shapes.

        Args:
            query, keys, offsets: as `ragged_decode` takes them; only shapes and devices count.
            received: whether calls will pass `received`: 2 bytes for each slot and query head of the group more.
            tuning: None = by the head's dimension.
            programs: None = `tuning.programs_per_sm` for each multiprocessor of the device, or a little fewer where
                regions of one length then need no cut, or only cuts into equal parts.

        Example:
            >>> import torch
            >>> from foveate.kernels.decode import Workspace
            >>> query, keys, offsets = torch.zeros(1, 4, 64), torch.zeros(500, 64), torch.tensor([0, 400, 500])
            >>> Workspace.allocate(query, keys, offsets, programs=6).weighted.shape  # 6 programs + 2 regions
            torch.Size([8, 2, 64])
        """
        dim, regions = keys.shape[1], offsets.shape[0] - 1
        group = query.shape[0] * query.shape[1] // regions
        # 16 KB of keys a tile: what pays at dimension 128 pays at the others, since bytes in flight are what counts.
        tuning = tuning or Tuning(block=min(128, 8192 // _power_of_2(dim)))
        programs = programs or _even(tuning.programs_per_sm * _multiprocessors(keys.device), regions)
        parts = programs + regions
        tiles = _most_tiles(keys, regions, tuning) if received else 0

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=keys.device)

        return cls(
            maximum=empty(parts, group),
            total=empty(parts, group),
            weighted=empty(parts, group, dim),
            counters=torch.zeros(regions + 1, dtype=torch.int32, device=keys.device),
            weights=empty(tiles, group, tuning.block, dtype=torch.float16),
            tops=empty(tiles, group),
            places=empty(tiles, 3, dtype=torch.int64),
            levels=empty(regions, group),
            programs=programs,
            tuning=tuning,
        )


def unavailable(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `ragged_decode` cannot run on such tensors, as a sentence; None where it can.

    Example:
        >>> import torch
        >>> from foveate.kernels.decode import unavailable
        >>> unavailable("cuda", torch.float32, 128)
        'The kernel takes float16 and bfloat16, not float32.'
    """
    if dtype not in DTYPES:
        return f"The kernel takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}."
    if head_dim not in DIMS:
        return f"The kernel takes a head_dim of {', '.join(map(str, DIMS))}, not {head_dim}."
    if triton is None:
        return "Triton is not installed: pip install 'foveate[cuda]'."
    if torch.device(device).type != "cuda" and not _interpreted():
        return f"The kernel needs a CUDA device, or TRITON_INTERPRET=1 set before triton is imported, not {device}."
    return None


def ragged_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    received: Tensor | None = None,
    forget: float = 1.0,
    softcap: float | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Attention of one query a sequence over its live entries, and what each entry received of it.

    One launch, with `received` two; no host synchronisation, and a grid that depends on shapes only: the call can be
    captured in a CUDA graph, and lengths and offsets may change between replays. Call it once before capture, which
    compiles the kernels.

    Args:
        query: (batch, head, head_dim), float16 or bfloat16; head_dim 32, 64, 96, 128 or 256.
        keys, values: (slots, head_dim), the query's dtype, contiguous: all regions one after another.
        offsets: (batch * kv_head + 1,), int32 or int64, ascending: KV head h of sequence b owns the slots from
            offsets[b * kv_head + h] up to the next offset. head is a multiple of kv_head.
        lengths: (batch * kv_head,), int32: live entries, the first of each region. More than the region holds counts
            as all of them; a region with none gives zeros.
        scaling: factor on the logits.
        received: (slots,), float32, updated in place for live entries: received * forget + the attention weights,
            summed over the group's query heads. Each weight is held to within 5e-4 of itself.
        forget: factor on the score so far.
        softcap: logits become softcap * tanh(logits / softcap); None = as they are.
        workspace: from `Workspace.allocate`; None = a new one each call (eight allocations, seen in the time of short
            caches). Calls that share one must run one after another on one stream.

    Returns:
        out (batch, head, head_dim), the query's dtype. Sums are float32; weights meet the values in their dtype.

    Raises:
        FoveateError: where `unavailable` says so, or shapes do not fit.

    Example:
        >>> import torch
        >>> from foveate.kernels.decode import ragged_decode, ragged_decode_reference, unavailable
        >>> decode = ragged_decode_reference if unavailable("cpu", torch.float32, 64) else ragged_decode
        >>> query, keys, values = torch.randn(1, 4, 64), torch.randn(500, 64), torch.randn(500, 64)
        >>> offsets, lengths = torch.tensor([0, 400, 500]), torch.tensor([360, 7], dtype=torch.int32)
        >>> decode(query, keys, values, offsets, lengths, scaling=0.125).shape
        torch.Size([1, 4, 64])
    """
    group = _check(query, keys, values, offsets, lengths, received)
    if reason := unavailable(query.device, query.dtype, query.shape[2]):
        raise FoveateError(f"ragged_decode can't run here. {reason} ragged_decode_reference runs anywhere.")
    if not (keys.is_contiguous() and values.is_contiguous() and (received is None or received.is_contiguous())):
        raise FoveateError("ragged_decode reads whole rows in order: give keys, values and received as contiguous.")
    regions, dim = lengths.shape[0], query.shape[2]
    if workspace is None:
        workspace = Workspace.allocate(query, keys, offsets, received=received is not None)
    space, tuning = workspace, workspace.tuning
    if space.weighted.shape != (space.programs + regions, group, dim) or (
        received is not None and space.weights.shape[0] < _most_tiles(keys, regions, tuning)
    ):
        raise FoveateError(
            f"The workspace was made for other shapes than {regions} regions of {group} query heads of {dim} in "
            f"{keys.shape[0]} slots{'' if received is None else ' with received'}: allocate one from these tensors."
        )
    query = query.contiguous()
    out = torch.empty_like(query)
    with torch.cuda.device_of(query):  # Triton launches on the current device, wherever the tensors are
        _attend[(space.programs,)](
            query,
            keys,
            values,
            offsets,
            lengths,
            out,
            space.maximum,
            space.total,
            space.weighted,
            space.counters,
            space.weights,
            space.tops,
            space.places,
            space.levels,
            regions,
            float(scaling * LOG2E),
            0.0 if softcap is None else softcap * LOG2E,
            group=group,
            dim=dim,
            dim_p2=_power_of_2(dim),
            block=tuning.block,
            regions_p2=max(16, _power_of_2(regions)),
            rows=max(16, _power_of_2(group)),  # the least that tl.dot takes
            group_p2=_power_of_2(group),
            capped=softcap is not None,
            keep=received is not None,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
        )
        if received is not None:
            group_p2 = _power_of_2(group)
            each = max(1, SCORED // (group_p2 * tuning.block))
            _score[(-(-_most_tiles(keys, regions, tuning) // each),)](
                received,
                space.counters,
                space.weights,
                space.tops,
                space.places,
                space.levels,
                regions,
                float(forget),
                group=group,
                block=tuning.block,
                group_p2=group_p2,
                each=each,
                num_warps=4,
            )
    return out


def ragged_decode_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    received: Tensor | None = None,
    forget: float = 1.0,
    softcap: float | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """The same as `ragged_decode` in plain PyTorch, region by region: any device, dtype and head_dim; no workspace.

    Sums are in the query's dtype, at least float32.

    Example:
        >>> import torch
        >>> from foveate.kernels.decode import ragged_decode_reference
        >>> query, keys, values = torch.zeros(1, 2, 64), torch.randn(8, 64), torch.ones(8, 64)
        >>> offsets, lengths = torch.tensor([0, 8]), torch.tensor([5], dtype=torch.int32)  # one KV head, 5 of 8 live
        >>> received = torch.zeros(8)
        >>> ragged_decode_reference(query, keys, values, offsets, lengths, scaling=0.125, received=received).unique()
        tensor([1.])
        >>> received  # two query heads, each with a fifth for every entry
        tensor([0.4000, 0.4000, 0.4000, 0.4000, 0.4000, 0.0000, 0.0000, 0.0000])
    """
    group = _check(query, keys, values, offsets, lengths, received)
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(lengths.shape[0], group, query.shape[2]).to(exact)
    out = torch.zeros_like(grouped)
    for region, length in enumerate(lengths.tolist()):
        start, end = offsets[region : region + 2].tolist()
        live = slice(start, start + min(max(length, 0), end - start))
        logits = grouped[region] @ keys[live].to(exact).T * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.softmax(dim=-1)
        out[region] = weights @ values[live].to(exact)
        if received is not None:
            received[live] = (received[live] * forget + weights.sum(dim=0)).to(received.dtype)
    return out.reshape(query.shape).to(query.dtype)


def merge_reference(maximum: Tensor, total: Tensor, weighted: Tensor) -> Tensor:
    """Merge softmaxes over parts of the entries into the one over all of them; the order of the parts does not matter.

    Args:
        maximum, total: (part, ...): largest logit of each part in base 2, and its sum of 2 ** (logit - maximum).
        weighted: (part, ..., head_dim): the part's values, weighted by these powers.

    Returns:
        (..., head_dim).

    Example:
        >>> import torch
        >>> from foveate.kernels.decode import merge_reference
        >>> maximum, total = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])  # two entries with logits 0 and 1
        >>> merge_reference(maximum, total, torch.tensor([[3.0], [6.0]]))
        tensor([5.])
    """
    share = torch.exp2(maximum - maximum.amax(dim=0))
    return (weighted * share[..., None]).sum(dim=0) / (total * share).sum(dim=0)[..., None]


def _check(
    query: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, lengths: Tensor, received: Tensor | None
) -> int:
    """Query heads a KV head. Looks at shapes and dtypes only: a look at values would wait for the device."""
    regions = lengths.shape[0]
    heads = query.shape[0] * query.shape[1] if query.dim() == 3 else 0
    if heads == 0 or regions == 0 or regions % query.shape[0] or heads % regions:
        raise FoveateError(
            f"query {tuple(query.shape)} and {regions} regions don't fit: query is (batch, head, head_dim), and there "
            "is a region for each sequence and KV head, with head a multiple of kv_head."
        )
    if keys.shape != values.shape or keys.dim() != 2 or keys.shape[1] != query.shape[2]:
        raise FoveateError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} don't fit: both are (slots, {query.shape[2]})."
        )
    if keys.dtype != query.dtype or values.dtype != query.dtype:
        raise FoveateError(f"query is {query.dtype}, keys {keys.dtype}, values {values.dtype}: give one dtype.")
    if (
        offsets.shape != (regions + 1,)
        or offsets.is_floating_point()
        or lengths.dtype not in (torch.int32, torch.int64)
    ):
        raise FoveateError(
            f"offsets {tuple(offsets.shape)} and lengths {tuple(lengths.shape)} don't fit: both are whole numbers, and "
            "there is one offset more than lengths."
        )
    if received is not None and (received.shape != keys.shape[:1] or not received.is_floating_point()):
        raise FoveateError(f"received {tuple(received.shape)} does not fit: it is ({keys.shape[0]},), float32.")
    return heads // regions


def _most_tiles(keys: Tensor, regions: int, tuning: Tuning) -> int:
    """Tiles that the slots make at most: each region ends in one that may not be full."""
    return keys.shape[0] // tuning.block + regions


def _even(most: int, regions: int) -> int:
    """Programs, `most` or up to a tenth fewer: where it can be, as many for each region, or as many regions for each.

    Then regions of one length are cut into equal parts, or not at all, and there is less or nothing to merge.
    """
    even = most - most % regions if regions <= most else -(-regions // -(-regions // most))
    return even if even >= 0.9 * most else most


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _interpreted() -> bool:
    """Whether the kernels run in Python: decided when Triton and this module were imported, not by what is set now."""
    return not isinstance(_attend, triton.JITFunction) and not isinstance(tl.sum, triton.JITFunction)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


if triton is not None:
    INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
    LOW = tl.constexpr(-1e38)  # below all logits, and unlike -inf nothing that subtraction makes nan of

    @triton.jit
    def _dot(a, b, acc):  # type: ignore[no-untyped-def]
        if INTERPRETED:  # Triton's interpreter multiplies bfloat16's bits as if they were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc)

    @triton.jit
    def _live(offsets, lengths, region, mask):  # type: ignore[no-untyped-def]
        """First slot and live entries of a region, or of many."""
        begin = tl.load(offsets + region, mask=mask, other=0)
        size = (tl.load(offsets + region + 1, mask=mask, other=0) - begin).to(tl.int32)
        length = tl.load(lengths + region, mask=mask, other=0).to(tl.int32)
        return begin.to(tl.int64), tl.maximum(tl.minimum(length, size), 0)

    @triton.jit
    def _write(  # type: ignore[no-untyped-def]
        out,
        levels,
        region,
        head,
        column,
        best,
        norm,
        acc,
        group: tl.constexpr,
        dim: tl.constexpr,
        keep: tl.constexpr,
    ):
        """A region's output, and its log-sum-exp if asked for. Of no entries: zeros."""
        norm = tl.where(norm > 0, norm, 1.0)
        row = region * group + head
        tl.store(
            out + row[:, None] * dim + column[None, :],
            (acc / norm[:, None]).to(out.dtype.element_ty),
            mask=(head < group)[:, None] & (column < dim)[None, :],
        )
        if keep:
            tl.store(levels + row, best + tl.log2(norm), mask=head < group)

    @triton.jit
    def _merge(  # type: ignore[no-untyped-def]
        out,
        levels,
        region,
        maximum,
        total,
        weighted,
        part,
        count,
        group: tl.constexpr,
        dim: tl.constexpr,
        group_p2: tl.constexpr,
        dim_p2: tl.constexpr,
        keep: tl.constexpr,
    ):
        """Writes a region's output out of its parts, which are `count` from `part` on."""
        chunk: tl.constexpr = max(1, 8192 // (group_p2 * dim_p2))  # parts at a time: 64 values a thread
        head = tl.arange(0, group_p2)
        column = tl.arange(0, dim_p2)
        best = tl.full([group_p2], LOW, tl.float32)
        norm = tl.zeros([group_p2], tl.float32)
        acc = tl.zeros([group_p2, dim_p2], tl.float32)
        for index in range(0, count, chunk):
            within = index + tl.arange(0, chunk)
            at = (part + within)[:, None] * group + head[None, :]
            mask = (within < count)[:, None] & (head < group)[None, :]
            # .cg: from L2, where other multiprocessors' stores are.
            top = tl.load(maximum + at, mask=mask, other=LOW, cache_modifier=".cg")
            sums = tl.load(total + at, mask=mask, other=0.0, cache_modifier=".cg")
            values = tl.load(
                weighted + at[:, :, None] * dim + column[None, None, :],
                mask=mask[:, :, None] & (column < dim)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            better = tl.maximum(best, tl.max(top, 0))
            shrink = tl.exp2(best - better)
            share = tl.exp2(top - better[None, :])
            norm = norm * shrink + tl.sum(sums * share, 0)
            acc = acc * shrink[:, None] + tl.sum(values * share[:, :, None], 0)
            best = better
        _write(out, levels, region, head, column, best, norm, acc, group, dim, keep)

    # A number that becomes 1 or a multiple of 16 must not compile anew: that may be in a graph's capture.
    @triton.jit(do_not_specialize=["regions"])
    def _attend(  # type: ignore[no-untyped-def]
        query,
        keys,
        values,
        offsets,
        lengths,
        out,
        maximum,
        total,
        weighted,
        counters,
        weights,
        tops,
        places,
        levels,
        regions,
        scale,
        softcap,
        group: tl.constexpr,
        dim: tl.constexpr,
        dim_p2: tl.constexpr,
        block: tl.constexpr,
        regions_p2: tl.constexpr,
        rows: tl.constexpr,
        group_p2: tl.constexpr,
        capped: tl.constexpr,
        keep: tl.constexpr,
    ):
        """An equal run of tiles for each program: [tiles * p // programs, tiles * (p + 1) // programs)."""
        program = tl.program_id(0)
        # Every program counts all tiles for itself: cheaper than a launch that does it once. A region with no entries
        # has one tile all the same, so that somebody writes its output.
        each = tl.arange(0, regions_p2)
        _, many = _live(offsets, lengths, each, each < regions)
        tiles = tl.where(each < regions, tl.maximum(tl.cdiv(many, block), 1), 0)
        ends = tl.cumsum(tiles, 0)
        all_tiles = tl.sum(tiles, 0)
        # No more programs than tiles: then none has an empty run, and a region's programs follow one another.
        programs = tl.minimum(tl.num_programs(0), all_tiles)
        if program >= programs:
            return
        run = all_tiles // programs
        rest = all_tiles % programs  # tiles * p // programs without a product beyond 32 bits
        first = program * run + program * rest // programs
        last = first + run + ((program + 1) * rest // programs - program * rest // programs)
        region = tl.sum((ends <= first).to(tl.int32), 0)
        left = tl.sum(tl.where(each == region, ends, 0), 0) - first  # tiles of this region that are still to come
        if keep and program == 0:
            tl.store(counters + regions, all_tiles)

        row = tl.arange(0, rows)
        column = tl.arange(0, dim_p2)
        entry_in_tile = tl.arange(0, block)
        best = tl.full([rows], LOW, tl.float32)
        norms = tl.zeros([rows, block], tl.float32)  # summed over entries where a region ends: fewer barriers
        acc = tl.zeros([rows, dim_p2], tl.float32)
        # One loop over all regions of the run, queries loaded with each tile: so the pipeline of loads never drains.
        for step in range(last - first):
            tile = first + step
            # Triton loads ahead only where all that the next step needs for its addresses (region and left, carried) is
            # also needed for the addresses of this one: it runs exactly this ahead of the arithmetic.
            fresh = left == 0
            region += fresh.to(tl.int32)
            begin, length = _live(offsets, lengths, region, region < regions)
            its_tiles = tl.maximum(tl.cdiv(length, block), 1)
            left = tl.where(fresh, its_tiles, left) - 1
            index = its_tiles - 1 - left
            alive = entry_in_tile < length - index * block
            q = tl.load(
                query + (region * group + row)[:, None] * dim + column[None, :],
                mask=(row < group)[:, None] & (column < dim)[None, :],
                other=0.0,
            )
            slot = begin + index * block
            where = entry_in_tile[:, None] * dim + column[None, :]
            mask = alive[:, None] & (column < dim)[None, :]
            # Read once: gone first from L2, so that the workspace stays in it.
            k = tl.load(keys + slot * dim + where, mask=mask, other=0.0, eviction_policy="evict_first")
            v = tl.load(values + slot * dim + where, mask=mask, other=0.0, eviction_policy="evict_first")
            score = _dot(q, tl.trans(k), tl.zeros([rows, block], tl.float32)) * scale
            if capped:  # tanh by the exponential that there is; it ends at 1 where the exponential overflows
                score = softcap * (1.0 - 2.0 / (tl.exp2(score / softcap * 2.8853900817779268) + 1.0))
            score = tl.where(alive[None, :], score, float("-inf"))
            better = tl.maximum(best, tl.max(score, 1))
            shrink = tl.exp2(best - better)
            weight = tl.exp2(score - better[:, None])
            norms = norms * shrink[:, None] + weight
            acc = _dot(weight.to(v.dtype), v, acc * shrink[:, None])
            best = better
            if keep:
                # By tile, not by slot: aligned whatever the region's first slot.
                at = tile.to(tl.int64) * group + row
                tl.store(
                    weights + at[:, None] * block + entry_in_tile[None, :],
                    weight.to(tl.float16),
                    mask=(row < group)[:, None] & (entry_in_tile >= 0)[None, :],
                )
                tl.store(tops + at, best, mask=row < group)
                place = places + tile.to(tl.int64) * 3
                tl.store(place, slot)
                tl.store(place + 1, tl.minimum(length - index * block, block).to(tl.int64))
                tl.store(place + 2, region.to(tl.int64))
            if (left == 0) | (tile + 1 == last):
                norm = tl.sum(norms, 1)
                if (tile - index >= first) & (left == 0):
                    _write(out, levels, region, row, column, best, norm, acc, group, dim, keep)
                else:
                    part = (program + region) * group + row
                    tl.store(maximum + part, best, mask=row < group)
                    tl.store(total + part, norm, mask=row < group)
                    tl.store(
                        weighted + part[:, None] * dim + column[None, :],
                        acc,
                        mask=(row < group)[:, None] & (column < dim)[None, :],
                    )
                best = tl.full([rows], LOW, tl.float32)
                norms = tl.zeros([rows, block], tl.float32)
                acc = tl.zeros([rows, dim_p2], tl.float32)

        # Only a run's first and last region can have tiles in other runs. Whoever arrives last at such a region merges
        # it; nobody waits. What makes all its parts visible to that program:
        # - the barrier orders every thread's stores above before its thread that does the atomic;
        # - the atomic releases them (to the device) and acquires what the programs that arrived before released;
        # - its result reaches the other threads through shared memory and a barrier, and they load parts only after it.
        # The counter goes back to zero by the last program that will touch it, and the next launch sees that.
        for side in range(2):
            tile = first + side * (last - 1 - first)
            region = tl.sum((ends <= tile).to(tl.int32), 0)
            region_end = tl.sum(tl.where(each == region, ends, 0), 0)
            region_start = region_end - tl.sum(tl.where(each == region, tiles, 0), 0)
            cut = (region_start < first) | (region_end > last)
            if cut & ((side == 0) | (region_start > first)):  # not the same region a second time
                # Tile t is program ((t + 1) * programs - 1) // tiles's.
                from_program = (((region_start + 1).to(tl.int64) * programs - 1) // all_tiles).to(tl.int32)
                to_program = ((region_end.to(tl.int64) * programs - 1) // all_tiles).to(tl.int32)
                count = to_program - from_program + 1
                tl.debug_barrier()
                arrived = tl.atomic_add(counters + region, 1, sem="acq_rel", scope="gpu")
                if arrived == count - 1:
                    tl.store(counters + region, 0)
                    part = from_program + region
                    _merge(
                        out, levels, region, maximum, total, weighted, part, count, group, dim, group_p2, dim_p2, keep
                    )

    @triton.jit(do_not_specialize=["regions"])
    def _score(  # type: ignore[no-untyped-def]
        received,
        counters,
        weights,
        tops,
        places,
        levels,
        regions,
        forget,
        group: tl.constexpr,
        block: tl.constexpr,
        group_p2: tl.constexpr,
        each: tl.constexpr,
    ):
        """Scales the exponentials of some tiles by what their regions came to, and adds them to `received`."""
        tile = tl.program_id(0) * each + tl.arange(0, each)
        there = tile < tl.load(counters + regions)
        tile = tile.to(tl.int64)
        head = tl.arange(0, group_p2)
        entry = tl.arange(0, block)
        slot = tl.load(places + tile * 3, mask=there, other=0)
        live = tl.load(places + tile * 3 + 1, mask=there, other=0)
        region = tl.load(places + tile * 3 + 2, mask=there, other=0)
        mask = there[:, None] & (head < group)[None, :]
        at = tile[:, None] * group + head[None, :]
        weight = tl.load(
            weights + at[:, :, None] * block + entry[None, None, :],
            mask=mask[:, :, None] & (entry >= 0)[None, None, :],
            other=0.0,
        )
        alive = entry[None, :] < live[:, None]
        into = received + slot[:, None] + entry[None, :]
        so_far = tl.load(into, mask=alive, other=0.0)
        top = tl.load(tops + at, mask=mask, other=0.0)
        level = tl.load(levels + region[:, None] * group + head[None, :], mask=mask, other=0.0)
        share = tl.sum(weight.to(tl.float32) * tl.exp2(top - level)[:, :, None], 1)
        tl.store(into, so_far * forget + share, mask=alive)
