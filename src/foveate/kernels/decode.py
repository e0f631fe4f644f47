"""Decode attention over ragged caches: one query a sequence, and as many live entries as each KV head kept.

A cache that evicts by head holds 300 entries here and 30,000 there. A launch with one block a head would wait for the
longest; here all entries of all heads make one row of tiles, and every program takes an equal run of it (stream-K). A
run may end inside a head, so programs leave partial softmaxes, and a second, short launch merges them by log-sum-exp
and adds what each entry received to its running score. Keys and values are read once for all query heads of a group.

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
SPAN = 512  # entries that a scoring program takes at a time: enough loads in flight to hide their latency


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
            shared memory, (stages - 1) * block * head_dim * 4 bytes each.
        overlap: launch the merge while the last tiles are read (programmatic dependent launch; Hopper and later).

    Example:
        >>> from foveate.kernels.decode import Tuning
        >>> Tuning(block=128, stages=2).programs_per_sm
        2
    """

    block: int = 64
    warps: int = 4
    stages: int = 3
    programs_per_sm: int = 2
    overlap: bool = False


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Memory between the two launches of `ragged_decode`. Make it once with `allocate` and use it for every layer.

    Its size depends on shapes only, never on lengths, and nothing in it lives from one call to the next.

    Attributes:
        maximum, total: (part, group), float32: largest logit in base 2, and sum of exponentials below it.
        weighted: (part, group, head_dim), float32: values weighted by these exponentials. A part is what one program
            saw of one region: program p and region r leave theirs at p + r, which no other pair shares, because from
            one part to the next either p or r grows.
        starts: (regions + 1,), int32: each region's first tile.
        logits: (tile, group, block), float32: kept for `received`; empty without it.
        programs: runs that the tiles are cut into.
        tuning: how.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    starts: Tensor
    logits: Tensor
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
            received: whether calls will pass `received`: 4 bytes for each slot and query head of the group more.
            tuning: None = by the head's dimension.
            programs: None = `tuning.programs_per_sm` for each multiprocessor of the device.

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
        programs = programs or tuning.programs_per_sm * _multiprocessors(keys.device)
        parts = programs + regions
        tiles = keys.shape[0] // tuning.block + regions if received else 0

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=keys.device)

        return cls(
            maximum=empty(parts, group),
            total=empty(parts, group),
            weighted=empty(parts, group, dim),
            starts=empty(regions + 1, dtype=torch.int32),
            logits=empty(tiles, group, tuning.block),
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

    Two launches, no host synchronisation, and a grid that depends on shapes only: the call can be captured in a CUDA
    graph, and lengths and offsets may change between replays. Call it once before capture, which compiles the kernels.

    Args:
        query: (batch, head, head_dim), float16 or bfloat16; head_dim 32, 64, 96, 128 or 256.
        keys, values: (slots, head_dim), the query's dtype, contiguous: all regions one after another.
        offsets: (batch * kv_head + 1,), int32 or int64, ascending: KV head h of sequence b owns the slots from
            offsets[b * kv_head + h] up to the next offset. head is a multiple of kv_head.
        lengths: (batch * kv_head,), int32: live entries, the first of each region. More than the region holds counts
            as all of them; a region with none gives zeros.
        scaling: factor on the logits.
        received: (slots,), float32, updated in place for live entries: received * forget + the attention weights,
            summed over the group's query heads.
        forget: factor on the score so far.
        softcap: logits become softcap * tanh(logits / softcap); None = as they are.
        workspace: from `Workspace.allocate`; None = a new one each call (five allocations, seen in the time of short
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
    tiles = keys.shape[0] // tuning.block + regions
    if space.weighted.shape != (space.programs + regions, group, dim) or (
        received is not None and space.logits.shape[0] < tiles
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
            space.maximum,
            space.total,
            space.weighted,
            space.starts,
            space.logits,
            regions,
            float(scaling * LOG2E),
            0.0 if softcap is None else softcap * LOG2E,
            group=group,
            dim=dim,
            dim_p2=_power_of_2(dim),
            block=tuning.block,
            regions_p2=max(16, _power_of_2(regions)),
            rows=max(16, _power_of_2(group)),  # the least that tl.dot takes
            capped=softcap is not None,
            keep_logits=received is not None,
            overlap=tuning.overlap,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
        )
        _finish(out, received, offsets, lengths, space, forget)
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


def _finish(
    out: Tensor, received: Tensor | None, offsets: Tensor, lengths: Tensor, space: Workspace, forget: float
) -> None:
    """Merge the parts in the workspace into `out` (batch, head, head_dim), and update `received`."""
    regions, (_, group, dim), block = lengths.shape[0], space.weighted.shape, space.tuning.block
    # One program merges one query head; where these are few and their parts many, one takes 32 dimensions of it.
    width = 32 if regions * group < space.programs else _power_of_2(dim)
    merging = regions * group * -(-dim // width)
    scoring = 0 if received is None else min(-(-space.logits.shape[0] * block // SPAN), 8 * space.programs)
    _merge[(scoring + merging,)](
        out,
        out if received is None else received,
        offsets,
        lengths,
        space.maximum,
        space.total,
        space.weighted,
        space.starts,
        space.logits,
        regions,
        space.programs,
        scoring,
        float(forget),
        group=group,
        dim=dim,
        block=block,
        regions_p2=max(16, _power_of_2(regions)),
        width=width,
        group_p2=_power_of_2(group),
        span=max(SPAN, block),
        score=received is not None,
        overlap=space.tuning.overlap,
        num_warps=4,
        **({"launch_pdl": True} if space.tuning.overlap else {}),
    )


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

    # A number that becomes 1 or a multiple of 16 must not compile anew: that may be in a graph's capture.
    @triton.jit(do_not_specialize=["regions"])
    def _attend(  # type: ignore[no-untyped-def]
        query,
        keys,
        values,
        offsets,
        lengths,
        maximum,
        total,
        weighted,
        starts,
        logits,
        regions,
        scale,
        softcap,
        group: tl.constexpr,
        dim: tl.constexpr,
        dim_p2: tl.constexpr,
        block: tl.constexpr,
        regions_p2: tl.constexpr,
        rows: tl.constexpr,
        capped: tl.constexpr,
        keep_logits: tl.constexpr,
        overlap: tl.constexpr,
    ):
        """An equal run of tiles for each program; what it saw of each region goes to the workspace."""
        if overlap:
            tl.extra.cuda.gdc_launch_dependents()
        program = tl.program_id(0)
        # Every program counts all tiles for itself: cheaper than a launch that does it once.
        each = tl.arange(0, regions_p2)
        inside = each < regions
        _, many = _live(offsets, lengths, each, inside)
        tiles = tl.cdiv(many, block)
        ends = tl.cumsum(tiles, 0)
        all_tiles = tl.sum(tiles, 0)
        if program == 0:
            tl.store(starts + each, ends - tiles, mask=inside)
            tl.store(starts + regions, all_tiles)
        run = tl.cdiv(all_tiles, tl.num_programs(0))
        tile = program * run
        last = tl.minimum(tile + run, all_tiles)
        region = tl.sum((ends <= tile).to(tl.int32), 0)
        region_start = tl.sum(tl.where(each < region, tiles, 0), 0)

        row = tl.arange(0, rows)
        column = tl.arange(0, dim_p2)
        entry_in_tile = tl.arange(0, block)
        while tile < last:
            begin, length = _live(offsets, lengths, region, region < regions)
            region_end = region_start + tl.cdiv(length, block)
            stop = tl.minimum(region_end, last)
            q = tl.load(
                query + (region * group + row)[:, None] * dim + column[None, :],
                mask=(row < group)[:, None] & (column < dim)[None, :],
                other=0.0,
            )
            region_keys = keys + begin * dim
            region_values = values + begin * dim
            best = tl.full([rows], float("-inf"), tl.float32)
            norm = tl.zeros([rows], tl.float32)
            acc = tl.zeros([rows, dim_p2], tl.float32)
            for index in range(tile - region_start, stop - region_start):
                entry = index * block + entry_in_tile
                alive = entry < length
                where = entry[:, None] * dim + column[None, :]
                mask = alive[:, None] & (column < dim)[None, :]
                # Read once: gone first from L2, so that the workspace stays in it.
                k = tl.load(region_keys + where, mask=mask, other=0.0, eviction_policy="evict_first")
                v = tl.load(region_values + where, mask=mask, other=0.0, eviction_policy="evict_first")
                score = _dot(q, tl.trans(k), tl.zeros([rows, block], tl.float32)) * scale
                if capped:  # tanh by the exponential that there is; it ends at 1 where the exponential overflows
                    score = softcap * (1.0 - 2.0 / (tl.exp2(score / softcap * 2.8853900817779268) + 1.0))
                if keep_logits:
                    # By tile, not by slot: aligned whatever the region's first slot.
                    at = logits + (region_start + index).to(tl.int64) * (group * block)
                    tl.store(
                        at + row[:, None] * block + entry_in_tile[None, :],
                        score,
                        mask=(row < group)[:, None] & alive[None, :],
                    )
                score = tl.where(alive[None, :], score, float("-inf"))
                better = tl.maximum(best, tl.max(score, 1))
                shrink = tl.exp2(best - better)
                weight = tl.exp2(score - better[:, None])
                norm = norm * shrink + tl.sum(weight, 1)
                acc = _dot(weight.to(v.dtype), v, acc * shrink[:, None])
                best = better
            part = (program + region) * group + row
            tl.store(maximum + part, best, mask=row < group)
            tl.store(total + part, norm, mask=row < group)
            tl.store(
                weighted + part[:, None] * dim + column[None, :],
                acc,
                mask=(row < group)[:, None] & (column < dim)[None, :],
            )
            tile = stop
            region_start = region_end
            region += 1

    @triton.jit
    def _parts(starts, region, programs, run):  # type: ignore[no-untyped-def]
        """First part of a region and how many it has."""
        first = tl.load(starts + region)
        end = tl.load(starts + region + 1)
        first_program = first // run
        count = tl.where(end > first, (end - 1) // run - first_program + 1, 0)
        return first_program + region, count

    @triton.jit(do_not_specialize=["regions", "programs", "scoring"])
    def _merge(  # type: ignore[no-untyped-def]
        out,
        received,
        offsets,
        lengths,
        maximum,
        total,
        weighted,
        starts,
        logits,
        regions,
        programs,
        scoring,
        forget,
        group: tl.constexpr,
        dim: tl.constexpr,
        block: tl.constexpr,
        regions_p2: tl.constexpr,
        width: tl.constexpr,
        group_p2: tl.constexpr,
        span: tl.constexpr,
        score: tl.constexpr,
        overlap: tl.constexpr,
    ):
        """The last programs merge parts into `out`; those before them, if any, add weights to `received`."""
        if overlap:
            tl.extra.cuda.gdc_wait()
        pid = tl.program_id(0)
        all_tiles = tl.load(starts + regions)
        run = tl.maximum(tl.cdiv(all_tiles, programs), 1)
        chunk: tl.constexpr = 32  # parts at a time
        if pid >= scoring:
            slices: tl.constexpr = (dim + width - 1) // width
            row = (pid - scoring) // slices  # of (regions * group)
            column = (pid - scoring) % slices * width + tl.arange(0, width)
            region = row // group
            first, count = _parts(starts, region, programs, run)
            best = float("-inf")
            norm = 0.0
            acc = tl.zeros([width], tl.float32)
            for index in range(0, count, chunk):
                part = index + tl.arange(0, chunk)
                at = (first + part) * group + row % group
                top = tl.load(maximum + at, mask=part < count, other=float("-inf"))
                sums = tl.load(total + at, mask=part < count, other=0.0)
                values = tl.load(
                    weighted + at[:, None] * dim + column[None, :],
                    mask=(part < count)[:, None] & (column < dim)[None, :],
                    other=0.0,
                )
                better = tl.maximum(best, tl.max(top, 0))
                shrink = tl.exp2(best - better)
                share = tl.exp2(top - better)
                norm = norm * shrink + tl.sum(sums * share, 0)
                acc = acc * shrink + tl.sum(values * share[:, None], 0)
                best = better
            acc = acc / tl.where(count > 0, norm, 1.0)
            tl.store(out + row * dim + column, acc.to(out.dtype.element_ty), mask=column < dim)
        elif score:
            each = tl.arange(0, regions_p2)
            ends = tl.load(starts + 1 + each, mask=each < regions, other=2147483647)
            mine = tl.cdiv(all_tiles, scoring)
            tile = pid * mine
            last = tl.minimum(tile + mine, all_tiles)
            region = tl.sum((ends <= tile).to(tl.int32), 0)
            head = tl.arange(0, group_p2)
            within = tl.arange(0, span)
            while tile < last:
                begin, length = _live(offsets, lengths, region, region < regions)
                region_start = tl.load(starts + region)
                stop = tl.minimum(tl.load(starts + region + 1), last)
                first, count = _parts(starts, region, programs, run)
                best = tl.full([group_p2], float("-inf"), tl.float32)
                norm = tl.zeros([group_p2], tl.float32)
                for index in range(0, count, chunk):
                    part = index + tl.arange(0, chunk)
                    at = (first + part)[:, None] * group + head[None, :]
                    mask = (part < count)[:, None] & (head < group)[None, :]
                    top = tl.load(maximum + at, mask=mask, other=float("-inf"))
                    sums = tl.load(total + at, mask=mask, other=0.0)
                    # A padded head has no maximum; -inf - -inf would be nan.
                    better = tl.maximum(tl.maximum(best, tl.max(top, 0)), -3.0e38)
                    norm = norm * tl.exp2(best - better) + tl.sum(sums * tl.exp2(top - better[None, :]), 0)
                    best = better
                level = best + tl.log2(
                    tl.maximum(norm, 1.0)
                )  # log-sum-exp; the largest logit itself makes norm at least 1
                for index in range(tile - region_start, stop - region_start, span // block):
                    its_tile = index + within // block
                    entry = index * block + within
                    alive = (its_tile < stop - region_start) & (entry < length)
                    mask = (head < group)[:, None] & alive[None, :]
                    at = (region_start + its_tile).to(tl.int64) * (group * block) + within % block
                    logit = tl.load(logits + at[None, :] + head[:, None] * block, mask=mask, other=float("-inf"))
                    weight = tl.where(mask, tl.exp2(logit - level[:, None]), 0.0)
                    slot = received + begin + entry
                    score_so_far = tl.load(slot, mask=alive, other=0.0)
                    tl.store(slot, score_so_far * forget + tl.sum(weight, 0), mask=alive)
                tile = stop
                region += 1
