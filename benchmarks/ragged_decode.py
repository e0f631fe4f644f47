"""How fast decode attention over ragged caches is: ragged_decode beside PyTorch's scaled_dot_product_attention.

    PYTHONPATH=src python benchmarks/ragged_decode.py           # a CUDA card: about two minutes
    PYTHONPATH=src python benchmarks/ragged_decode.py --sweep   # which tuning is fastest
    PYTHONPATH=src python benchmarks/ragged_decode.py --smoke   # a CPU, tiny sizes: times mean nothing

32 query heads and 8 KV heads of 128 dimensions in bfloat16, a Llama 3 8B layer. Every figure is the median over rounds
in which the candidates take turns, and the spread is the interquartile range over the median. A round runs enough calls
on different inputs that the L2 cache holds nothing of the last one. "graph" replays a CUDA graph, so the device's own
time; "eager" is launched from Python, the card's events around many calls.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

if "--smoke" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.errors import FoveateError
from foveate.kernels.decode import Tuning, Workspace, ragged_decode, ragged_decode_reference

KV_HEADS, GROUP, DIM = 8, 4, 128
BYTES = 2 * DIM * 2  # key and value of an entry
CUDA = torch.cuda.is_available() and "--smoke" not in sys.argv
DEVICE = "cuda" if CUDA else "cpu"
GRAPH = (True, False) if CUDA else (False,)
L2 = torch.cuda.get_device_properties(0).L2_cache_size if CUDA else 0
RECORDS: list[dict] = []

Call = Callable[[int], Tensor]
"""Runs one call on the i-th set of inputs."""


class Inputs:
    """Some sets of queries, keys and values, more than four times the L2 cache together, over the same regions."""

    def __init__(self, batch: int, rooms: list[int]) -> None:
        slots = sum(rooms)
        count = max(1, -(-4 * L2 // (slots * BYTES)))
        self.batch, self.rooms = batch, rooms
        self.sets = [
            tuple(
                torch.empty(shape, device=DEVICE, dtype=torch.bfloat16).normal_()
                for shape in ((batch, KV_HEADS * GROUP, DIM), (slots, DIM), (slots, DIM))
            )
            for _ in range(count)
        ]
        self.received = [torch.zeros(slots, device=DEVICE) for _ in range(count)]
        self.set_regions(rooms)

    def set_regions(self, rooms: list[int]) -> None:
        self.offsets = torch.tensor([0, *itertools.accumulate(rooms)], device=DEVICE)
        self.lengths = torch.tensor(rooms, dtype=torch.int32, device=DEVICE)
        self.entries = sum(rooms)

    def ours(self, *, received: bool = False, tuning: Tuning | None = None) -> Call:
        query, keys, _ = self.sets[0]
        space = Workspace.allocate(query, keys, self.offsets, received=received, tuning=tuning)
        offsets, lengths = self.offsets, self.lengths

        def call(i: int) -> Tensor:
            query, keys, values = self.sets[i % len(self.sets)]
            score = self.received[i % len(self.sets)] if received else None
            return ragged_decode(
                query,
                keys,
                values,
                offsets,
                lengths,
                scaling=DIM**-0.5,
                received=score,
                forget=0.9,
                workspace=space,
            )

        return call

    def sdpa(self, *, folded: bool) -> Call:
        """For regions of one length. Folded: a group's query heads become queries, and nobody repeats keys."""

        def call(i: int) -> Tensor:
            query, keys, values = self.sets[i % len(self.sets)]
            k, v = (t.view(self.batch, KV_HEADS, -1, DIM) for t in (keys, values))
            if folded:
                return scaled_dot_product_attention(query.view(self.batch, KV_HEADS, GROUP, DIM), k, v)
            return scaled_dot_product_attention(query[:, :, None], k, v, enable_gqa=True)

        return call


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


class Timer:
    """Milliseconds a call, over enough calls that a round lasts about `budget` milliseconds."""

    def __init__(self, call: Call, sets: int, *, graph: bool, budget: float) -> None:
        for i in range(sets):
            call(i)
        synchronize()
        begin = time.perf_counter()
        for i in range(sets):
            call(i)
        synchronize()
        one = (time.perf_counter() - begin) / sets * 1e3
        self.call, self.calls = call, (sets if not CUDA else -(-max(1, min(400, int(budget / one))) // sets) * sets)
        self.graph = None
        if graph and CUDA:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.keep = [call(i) for i in range(self.calls)]
            self.graph.replay()
            synchronize()

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for i in range(self.calls):
                self.call(i)

    def __call__(self) -> float:
        if not CUDA:
            start = time.perf_counter()
            self.run()
            return (time.perf_counter() - start) / self.calls * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / self.calls


def alternate(
    calls: dict[str, Call], sets: int, *, graph: bool = True, rounds: int = 15, budget: float = 16.0
) -> dict[str, list[float]]:
    """Times of each, a round after another, so that a drift of the clock meets all of them."""
    timers = {name: Timer(call, sets, graph=graph, budget=budget) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds if CUDA else 2):
        for name, timer in timers.items():
            times[name].append(timer())
    return times


def spread(times: list[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def record(**fields: object) -> None:
    RECORDS.append(fields)
    texts = [
        f"{v:8.4f}" if isinstance(v, float) and k.endswith("ms") else f"{v:.3f}" if isinstance(v, float) else str(v)
        for k, v in fields.items()
    ]
    print("  ".join(f"{k} {text}" for k, text in zip(fields, texts, strict=True)), flush=True)


def header() -> None:
    import triton

    print(f"torch {torch.__version__}, triton {triton.__version__}, python {sys.version.split()[0]}")
    if not CUDA:
        print("CPU under Triton's interpreter: these times mean nothing")
        return
    card = torch.cuda.get_device_properties(0)
    print(f"{card.name}, {card.multi_processor_count} multiprocessors, {card.total_memory / 2**30:.0f} GiB")
    source = torch.empty(2**30, dtype=torch.int32, device=DEVICE).random_()
    target = torch.empty_like(source)
    times = alternate({"copy": lambda i: target.copy_(source)}, 1, graph=False)["copy"]
    record(copy_ms=statistics.median(times), TB_s=2 * source.nbytes / statistics.median(times) / 1e9)


def error(inputs: Inputs, call: Call, want: Tensor) -> float:
    return ((call(0).double() - want).norm() / want.norm()).item()


def uniform(batch: int, entries: int) -> None:
    inputs = Inputs(batch, [entries] * (batch * KV_HEADS))
    calls = {
        "sdpa_gqa": inputs.sdpa(folded=False),
        "sdpa_folded": inputs.sdpa(folded=True),
        "ours": inputs.ours(),
        "received": inputs.ours(received=True),
    }
    for name in list(calls):
        try:
            calls[name](0)
        except torch.OutOfMemoryError:  # SDPA without a kernel for grouped queries repeats the keys
            print(f"{name} needs more memory than there is")
            del calls[name]
    baselines = [name for name in calls if name.startswith("sdpa")]
    bytes_read = inputs.entries * BYTES
    for graph in GRAPH:
        sets = len(inputs.sets)
        times = alternate(calls, sets, graph=graph)
        best = min(baselines, key=lambda name: statistics.median(times[name]))
        got = {name: statistics.median(t) for name, t in times.items()}
        record(
            uniform="graph" if graph else "eager",
            batch=batch,
            entries=entries,
            sdpa=best.removeprefix("sdpa_"),
            sdpa_ms=got[best],
            other_ms=max(got[name] for name in baselines),
            ours_ms=got["ours"],
            received_ms=got["received"],
            sdpa_TB_s=bytes_read / got[best] / 1e9,
            ours_TB_s=bytes_read / got["ours"] / 1e9,
            faster=ratio(times[best], times["ours"]),
            faster_received=ratio(times[best], times["received"]),
            spread_sdpa=spread(times[best]),
            spread_ours=spread(times["ours"]),
        )
    want = inputs.sdpa(folded=True)(0).reshape(batch, -1, DIM).double()
    inputs.received[0].zero_()
    calls["received"](0)
    mass = inputs.received[0].view(batch * KV_HEADS, -1).sum(1) / GROUP - 1  # weights of each head sum to 1
    record(from_sdpa=error(inputs, calls["ours"], want), mass_off=mass.abs().max().item())


def ragged(name: str, batch: int, rooms: list[int]) -> None:
    """Ragged lengths beside equal ones over the same memory: the same bytes, so the same time if raggedness is free."""
    total = sum(rooms)
    inputs = Inputs(batch, rooms)
    calls = {"ragged": inputs.ours(), "ragged_received": inputs.ours(received=True)}
    inputs.set_regions([total // len(rooms)] * len(rooms))
    calls |= {"equal": inputs.ours(), "equal_received": inputs.ours(received=True)}
    for graph in GRAPH:
        times = alternate(calls, len(inputs.sets), graph=graph)
        got = {key: statistics.median(t) for key, t in times.items()}
        record(
            ragged="graph" if graph else "eager",
            case=name,
            batch=batch,
            entries=total,
            ragged_ms=got["ragged"],
            equal_ms=got["equal"],
            received_ms=got["ragged_received"],
            TB_s=total * BYTES / got["ragged"] / 1e9,
            over_bytes_time=ratio(times["ragged"], times["equal"]),
            over_bytes_time_received=ratio(times["ragged_received"], times["equal_received"]),
            spread=spread(times["ragged"]),
        )
    if total <= 1 << 21:
        inputs.set_regions(rooms)
        query, keys, values = (t.float() for t in inputs.sets[0])
        want = ragged_decode_reference(query, keys, values, inputs.offsets, inputs.lengths, scaling=DIM**-0.5)
        record(from_twin=error(inputs, calls["ragged"], want.double()))


def sweep(sizes: list[tuple[int, int]], received: bool) -> None:
    """Every tuning whose programs fit the shared memory at once. The column that matters is the worst of a row."""
    cuts = [(32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 4), (128, 4, 2), (128, 8, 3)]
    tunings = [
        Tuning(block=block, warps=warps, stages=stages, programs_per_sm=per_sm)
        for block, warps, stages in cuts
        for per_sm in (1, 2, 3, 4, 6)
        if 96 << 10 <= (stages - 1) * block * per_sm * BYTES <= 216 << 10
    ]
    tunings.insert(1, replace(Tuning(), overlap=True))
    results: dict[Tuning, list[float]] = {tuning: [] for tuning in (tunings if CUDA else tunings[:1])}
    for batch, entries in sizes:
        inputs = Inputs(batch, [entries] * (batch * KV_HEADS))
        calls: dict[Tuning, Call] = {}
        for tuning in results:
            call = inputs.ours(received=received, tuning=tuning)
            try:
                call(0)
                synchronize()
                calls[tuning] = call
            except Exception as trouble:  # more shared memory than there is
                print(f"{tuning}: {str(trouble).splitlines()[0]}")
        named = {str(i): call for i, call in enumerate(calls.values())}
        times = alternate(named, len(inputs.sets), rounds=7, budget=4.0)
        for tuning, measured in zip(calls, times.values(), strict=True):
            results[tuning].append(statistics.median(measured))
        del inputs, calls, named
    best = [min(r[i] for r in results.values() if len(r) == len(sizes)) for i in range(len(sizes))]
    whole = {t: r for t, r in results.items() if len(r) == len(sizes)}
    print("sizes (batch, entries):", sizes, "received" if received else "")
    for tuning, got in sorted(whole.items(), key=lambda item: max(a / b for a, b in zip(item[1], best, strict=True))):
        record(
            block=tuning.block,
            warps=tuning.warps,
            stages=tuning.stages,
            per_sm=tuning.programs_per_sm,
            overlap=tuning.overlap,
            worst=max(a / b for a, b in zip(got, best, strict=True)),
            us=" ".join(f"{g * 1e3:9.2f}" for g in got),
            TB_s=" ".join(f"{b * KV_HEADS * n * BYTES / g / 1e9:.2f}" for (b, n), g in zip(sizes, got, strict=True)),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--entries", type=int, nargs="+", default=[8192, 32768, 131072], help="a KV head")
    parser.add_argument("--sweep", action="store_true", help="only compare tunings")
    parser.add_argument("--received", action="store_true", help="with --sweep: with the running score")
    parser.add_argument("--smoke", action="store_true", help="a CPU, tiny sizes")
    parser.add_argument("--out", help="write the figures to this file, as JSON")
    args = parser.parse_args()
    if not (CUDA or args.smoke):
        raise FoveateError("No CUDA device here: --smoke runs tiny sizes on the CPU.")
    if args.smoke:
        args.batch, args.entries = [1], [40]
    torch.manual_seed(0)
    header()
    long, short = (32768, 512) if CUDA else (40, 10)
    if args.sweep:
        sweep([(1, 8192), (1, 32768), (1, 131072), (16, 8192), (16, 32768)] if CUDA else [(1, 40)], args.received)
    else:
        for batch, entries in itertools.product(args.batch, args.entries):
            uniform(batch, entries)
        for batch in args.batch:
            quarter = [long if head < KV_HEADS // 4 else short for _ in range(batch) for head in range(KV_HEADS)]
            ragged("a quarter long", batch, quarter)
            rooms = torch.randint(short // 2, long + 1, (batch * KV_HEADS,)).tolist()
            rooms[-1] += -sum(rooms) % len(rooms)  # so that equal regions cover the same slots
            ragged("random", batch, rooms)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(RECORDS, file, indent=1)


if __name__ == "__main__":
    main()
