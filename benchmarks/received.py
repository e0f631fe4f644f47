"""What it costs to learn what each key received: attend_and_receive beside scaled_dot_product_attention alone.

    python benchmarks/received.py                  # 8k, 16k, 32k, 64k tokens; 32 query and 8 KV heads of 128; bfloat16
    python benchmarks/received.py --length 32761   # a length that is no multiple of anything
    python benchmarks/received.py --sweep          # every cut of the kernel at 32k, fastest first
    python benchmarks/received.py --smoke          # tiny, on a CPU: only that it runs

Per length: milliseconds of attention alone (SDPA's own choice or cuDNN, the faster), of out + received, and of the mass
alone, each in turn within a round; the ratio is the median over rounds of (out + received) / alone, with its 10th and
90th percentile. Memory is the peak beyond that of attention alone. Errors are norms of the difference over norms,
against float64, for all columns of one KV head; `sum` is how far any head's masses are from adding up to all queries.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs without an installation, too

from foveate.kernels import received as module  # noqa: E402
from foveate.kernels.received import Config, attend_and_receive, attend_and_receive_reference, received_mass  # noqa: E402
from foveate.measure.clock import alternated, timed  # noqa: E402


def inputs(length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Random, laid out as a model's projections give them: (batch, length, head, head_dim) transposed."""
    torch.manual_seed(length)
    shapes = [(1, length, h, dim) for h in (heads, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, device=device).to(dtype).transpose(1, 2) for shape in shapes)


def milliseconds(work: Callable[[], object], device: torch.device, calls: int) -> float:
    """Of one call, over `calls` in a row."""

    def several() -> None:
        for _ in range(calls):
            work()

    return timed(several, device)[0] / calls * 1000


def peak(work: Callable[[], object]) -> int:
    """Bytes held at most by the work beyond what was held before."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def baseline(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[str, Callable[[], Tensor]]:
    """Attention alone: SDPA's own choice of backend, or cuDNN's if that is faster."""

    def own() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return own()

    if not query.is_cuda:
        return "own", own
    ways: dict[str, Callable[[], Tensor]] = {"own": own}
    try:
        cudnn()
        ways["cudnn"] = cudnn
    except RuntimeError as error:
        print(f"cuDNN's attention does not run here: {error}")
    times = {name: milliseconds(way, query.device, 4) for name, way in ways.items() if way() is not None}
    fastest = min(times, key=times.__getitem__)
    return fastest, ways[fastest]


def errors(query: Tensor, key: Tensor, value: Tensor, scaling: float, out: Tensor, received: Tensor) -> str:
    """Against float64, for one KV head and its group; and what all heads' masses add up to."""
    group = query.shape[1] // key.shape[1]
    head = key.shape[1] - 1
    heads = slice(head * group, (head + 1) * group)
    if query.is_cuda:
        module.BLOCK = 1 << 27
    exact_out, exact = attend_and_receive_reference(
        query[:, heads].double(), key[:, head:].double(), value[:, head:].double(), scaling=scaling
    )
    mass = ((received[:, head:].double() - exact).norm() / exact.norm()).item()
    values = ((out[:, heads].double() - exact_out).norm() / exact_out.norm()).item()
    total = (received.double().sum(-1) / (group * query.shape[2]) - 1).abs().max().item()
    return f"received {mass:.1e}  out {values:.1e}  sum {total:.1e}"


def measure(length: int, args: argparse.Namespace, dtype: torch.dtype, device: str) -> None:
    """One line of the table, and one of errors."""
    query, key, value = inputs(length, args.heads, args.kv_heads, args.dim, dtype, device)
    scaling = args.dim**-0.5
    name, alone = baseline(query, key, value, scaling)
    both = partial(attend_and_receive, query, key, value, scaling=scaling)
    sides: list[Callable[[], object]] = [alone, both]
    if module.available(query):
        lse = module._attend(query, key, value, scaling)[1]
        sides.append(partial(received_mass, query, key, lse, scaling=scaling))
    once = (
        milliseconds(both, query.device, 1)
        if not query.is_cuda
        else min(milliseconds(both, query.device, 1) for _ in range(3))
    )
    calls = max(1, min(50, int(30 / once)))
    times = alternated([partial(milliseconds, side, query.device, calls) for side in sides], args.rounds)
    ratios = sorted(b / a for a, b in zip(times[0], times[1], strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    middle = [f"{statistics.median(t):9.3f}" for t in times] + ["        -"] * (3 - len(times))
    memory = f"{(peak(both) - peak(alone)) / 2**20:8.1f}" if query.is_cuda else "       -"
    ratio = f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
    print(f"{length:7d}  {name:>5} {'  '.join(middle)}   {ratio:22s} {memory}", flush=True)
    out, received = both()
    print(f"         errors: {errors(query, key, value, scaling, out, received)}", flush=True)
    for kind, config in module._best.items():
        print(f"         chosen for {kind[1:]}: {config}")
    module._best.clear()


def candidates(tma: bool) -> list[Config]:
    """Cuts worth a try on Hopper."""
    found = []
    for poly, stages in itertools.product((False, True), (2, 3)):
        for registers in (None, 168):
            found.append(Config(64, 128, tma=tma, poly=poly, stages=stages, registers=registers))
        found.append(Config(64, 128, poly=poly, stages=stages, registers=168))
        found.append(Config(64, 64, tma=tma, poly=poly, stages=stages))
        found.append(Config(64, 256, tma=tma, poly=poly, warps=8, stages=stages))
        found.append(Config(128, 128, tma=tma, poly=poly, warps=8, stages=stages))
        found.append(Config(128, 128, keys_first=True, tma=tma, poly=poly, stages=stages))
        for registers in (None, 128):
            found.append(
                Config(128, 128, keys_first=True, tma=tma, poly=poly, warps=8, stages=stages, registers=registers)
            )
        found.append(Config(64, 128, keys_first=True, tma=tma, poly=poly, stages=stages))
        found.append(Config(64, 256, keys_first=True, tma=tma, poly=poly, warps=8, stages=stages, registers=128))
        found.append(Config(128, 256, keys_first=True, tma=tma, poly=poly, warps=8, stages=stages))
        found.append(Config(128, 256, keys_first=True, tma=tma, poly=poly, warps=16, stages=stages))
        found.append(Config(256, 128, keys_first=True, tma=tma, poly=poly, warps=8, stages=stages))
    return list(dict.fromkeys([*module.CONFIGS, *found]))


def compiled(config: Config, lengths: list[int], args: argparse.Namespace, dtype: torch.dtype) -> str | None:
    """Put the kernel into Triton's cache on disk: in a process of its own, so that many compile at once."""
    try:
        for length in lengths:
            small = 512 + length % 16  # Triton compiles apart for multiples of 16
            query, key, _ = inputs(small, args.heads, args.kv_heads, args.dim, dtype, "cuda")
            module._launch(config, query, key, torch.zeros(query.shape[:3], device="cuda"), 1.0)
        torch.cuda.synchronize()
    except Exception as error:  # a cut that doesn't fit the card: said in the table
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:90]
    return None


def sweep(length: int, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Milliseconds of every cut, at the length and at an odd one, fastest first."""
    lengths = [length, length - 7]
    configs = candidates(tma=True)
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        failures = list(pool.map(partial(compiled, lengths=lengths, args=args, dtype=dtype), configs))
    scaling = args.dim**-0.5
    work = {}
    for n in lengths:
        query, key, value = inputs(n, args.heads, args.kv_heads, args.dim, dtype, "cuda")
        shift = module._attend(query, key, value, scaling)[1] * module.LOG2E
        work[n] = (query, key, shift, module._launch(Config(64, 128), query, key, shift, scaling))
    rows = []
    for config, failure in zip(configs, failures, strict=True):
        if failure is not None:
            print(f"     failed  {config}: {failure}")
            continue
        times, differences = [], []
        for query, key, shift, first in work.values():
            run = partial(module._launch, config, query, key, shift, scaling)
            differences.append(((run() - first).norm() / first.norm()).item())
            times.append(statistics.median(milliseconds(run, query.device, 2) for _ in range(5)))
        rows.append((times, max(differences), config))
    print(f"{'ms ' + str(lengths[0]):>10} {'ms ' + str(lengths[1]):>10}  difference from the first cut")
    for times, difference, config in sorted(rows, key=lambda row: row[0]):
        print(f"{times[0]:10.3f} {times[1]:10.3f}  {difference:.1e}  {config}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", help="tokens (8192 16384 32768 65536; --sweep: 32768)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128, help="head_dim")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep", action="store_true", help="time every cut of the kernel, instead")
    parser.add_argument("--processes", type=int, default=14, help="that compile for --sweep")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA card here; --smoke runs on a CPU")
    if args.smoke:
        args.heads, args.kv_heads, args.dim, args.rounds = 4, 2, 64, 3
    dtype = getattr(torch, args.dtype)
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    triton = importlib.metadata.version("triton") if module.triton is not None else "none"
    cudnn = torch.backends.cudnn.version() if device == "cuda" else "-"
    print(f"{card}; torch {torch.__version__}, Triton {triton}, cuDNN {cudnn}, Python {sys.version.split()[0]}")
    print(f"{args.heads} query heads, {args.kv_heads} KV heads of {args.dim}, {args.dtype}, causal, batch 1")
    if args.sweep:
        for length in args.length or [32768]:
            sweep(length, args, dtype)
        return
    print(f"{'tokens':>7}  {'SDPA':>5} {'ms':>9}  {'ms both':>9}  {'ms mass':>9}   {'ratio [10 %, 90 %]':22s} MiB more")
    for length in args.length or ([33, 96] if args.smoke else [8192, 16384, 32768, 65536]):
        measure(length, args, dtype, device)


if __name__ == "__main__":
    main()
