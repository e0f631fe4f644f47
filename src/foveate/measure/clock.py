"""Time and memory of a piece of work, on a CPU and on a GPU."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds that `work` took on the device, and what it returned: CUDA events on a GPU, else wall time.

    Example:
        >>> seconds, total = timed(lambda: torch.ones(8).sum().item(), torch.device("cpu"))
        >>> seconds > 0, total
        (True, 8.0)
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        result = work()
        return time.perf_counter() - begin, result
    stream = torch.cuda.current_stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record(stream)
    result = work()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1000, result


def alternated(
    sides: Sequence[Callable[[], T]], repeats: int, progress: Callable[[float], None] = lambda fraction: None
) -> list[list[T]]:
    """What each side returned in `repeats` rounds, after one round to warm up.

    Every round runs all sides, forwards and backwards by turns, so that a machine that slows down in the
    meantime is fair to all. The results of one round belong together: compare these, not the sides' averages.

    Args:
        sides: what to run.
        repeats: rounds that count.
        progress: called with the fraction done.

    Returns:
        for each side, its result in each round.

    Example:
        >>> alternated([lambda: "a", lambda: "b"], repeats=2)
        [['a', 'a'], ['b', 'b']]
    """
    results: list[list[T]] = [[] for _ in sides]
    for turn in range(repeats + 1):
        numbered = list(enumerate(sides))
        for i, side in numbered if turn % 2 else reversed(numbered):
            result = side()
            if turn:
                results[i].append(result)
        progress((turn + 1) / (repeats + 1))
    return results


def peak_bytes(work: Callable[[], T], device: torch.device) -> tuple[int, T]:
    """The most bytes that `work` had allocated on the device at one time beyond those before; its result.

    On a GPU it is what PyTorch's allocator says. On a CPU tensors are counted as operations make and free
    them, which leaves out only what an operation needs within itself. (Resident memory would not do: freed
    pages stay with the process.)

    Example:
        >>> peak_bytes(lambda: (torch.ones(1000) + 1).sum(), torch.device("cpu"))[0]
        8000
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return torch.cuda.max_memory_allocated(device) - before, result
    with _LiveTensors() as live:
        result = work()
    return live.peak, result


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that were made since it came in force and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.known.update(t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        out = func(*args, **kwargs)
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if storage not in self.known:  # neither a view of something older
                self.known.add(storage)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.bytes -= size
