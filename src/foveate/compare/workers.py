"""Where cells run: in this process, or in child processes that are replaced when they die."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import set_seed

from foveate.compare.grid import Cell, versions, weights_digest
from foveate.data.text import Text
from foveate.errors import FoveateError
from foveate.methods import Recipe
from foveate.models.load import load
from foveate.tasks import TASKS, Bench
from foveate.tasks.base import Progress

Result = dict[str, Any]
"""What running a cell gave: `status`, `seconds`, `metrics`, `artifacts`; where it failed, `reason`, maybe
`traceback`."""

PROGRESS_SECONDS = 0.2
"""How often at most a child process tells how far it is."""


class Watcher(Protocol):
    """Who is told what happens to the cells."""

    def started(self, cell: Cell) -> None: ...
    def progressed(self, cell: Cell, fraction: float) -> None: ...
    def finished(self, cell: Cell, result: Result) -> None: ...


# ---- one cell ------------------------------------------------------------------------------------------


def run_cell(bench: Bench, cell: Cell, progress: Progress) -> Result:
    """Measure one cell. Whatever goes wrong is its result: only what stops the whole run is raised."""
    began = time.perf_counter()
    try:
        set_seed(cell.setting["seed"])
        task, recipe = TASKS.parse(cell.task), Recipe.of(cell.recipe)
        outcome = task.measure(dataclasses.replace(bench, progress=progress), recipe)
        for name, metric in outcome.metrics.items():
            if not math.isfinite(metric.value):
                raise FoveateError(
                    f"{name} came out as {metric.value}: the model's numbers overflow under this recipe. "
                    "Try another dtype."
                )
        return {
            "status": "ok",
            "seconds": time.perf_counter() - began,
            "metrics": {name: metric.to_json() for name, metric in outcome.metrics.items()},
            "artifacts": _plain(outcome.artifacts),
        }
    except Exception as error:
        return failed(error, began)


def failed(error: Exception, began: float) -> Result:
    """The result of a cell, started at `time.perf_counter() == began`, that ended in `error`."""
    result: Result = {
        "status": "failed",
        "reason": str(error),
        "seconds": time.perf_counter() - began,
        "metrics": {},
        "artifacts": {},
    }
    if not isinstance(error, FoveateError):  # nobody foresaw it
        result["reason"] = _reason(error)
        result["traceback"] = "".join(traceback.format_exception(error))
    return result


def _reason(error: Exception) -> str:
    """What an error says and the innermost place, in a line."""
    said = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in said:
        return f"out of memory: {said}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {said} ({Path(frame.filename).name}:{frame.lineno})"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- one model -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """How a process, here or on another machine, gets the model that the run is about.

    Attributes:
        model, dtype, device: as `foveate.load` takes them.
        text: sent along, because a file may not be there on another machine.
        weights, versions: what must be the same there; None in the process that finds them out.
    """

    model: str
    dtype: str
    device: str
    text: Text
    weights: str | None = None
    versions: dict[str, str] | None = field(default=None, hash=False)

    def open(self) -> Bench:
        if self.versions is not None and versions() != self.versions:
            raise FoveateError(
                f"the run was started with {self.versions}, but here is {versions()}: install the same."
            )
        model, tokenizer = load(self.model, dtype=self.dtype, device=self.device)
        if self.weights is not None and weights_digest(model) != self.weights:
            raise FoveateError(
                f"{self.model} is another model here than where the run started: give all machines the same."
            )
        return Bench(model, tokenizer, self.text)


class Seat:
    """A model that cells run on, opened anew after a cell that may have left it in any state.

    Args:
        open: gives the bench; called again after a failure that nobody foresaw.
    """

    def __init__(self, open: Callable[[], Bench]):
        self._open = open
        self._bench: Bench | None = None

    def bench(self) -> Bench:
        self._bench = self._bench or self._open()
        return self._bench

    def run(self, cell: Cell, progress: Progress) -> Result:
        began = time.perf_counter()
        try:
            self.bench()
        except Exception as error:
            return failed(error, began)
        result = run_cell(self.bench(), cell, progress)
        if "traceback" in result:
            self._bench = None
            gc.collect()
            torch.cuda.empty_cache()
        return result


def in_this_process(cells: Sequence[Cell], seat: Seat, watcher: Watcher) -> None:
    """Run cells one after the other."""
    for cell in cells:
        watcher.started(cell)
        watcher.finished(cell, seat.run(cell, functools.partial(watcher.progressed, cell)))


# ---- child processes -----------------------------------------------------------------------------------


@dataclass
class _Child:
    """A child process, this end of the pipe to it, and the cell that it is at."""

    process: BaseProcess
    pipe: Connection
    cell: Cell
    began: float


def in_children(cells: Sequence[Cell], source: Source, count: int, watcher: Watcher) -> None:
    """Run cells on `count` processes, each with a model of its own and its share of the cores.

    A child that dies takes the cell that it was at with it, and a fresh one takes its place.
    """
    waiting = deque(cells)
    children: dict[Connection, _Child] = {}
    threads = max(1, (os.cpu_count() or 1) // count)
    try:
        while waiting or children:
            while waiting and len(children) < count:
                child = _start(source, threads, waiting.popleft())
                children[child.pipe] = child
                watcher.started(child.cell)
            for pipe in wait(list(children)):
                child = children[pipe]  # type: ignore[index]
                try:
                    said = child.pipe.recv()
                except (EOFError, OSError):
                    del children[child.pipe]
                    watcher.finished(child.cell, _died(child))
                    continue
                if isinstance(said, float):
                    watcher.progressed(child.cell, said)
                    continue
                watcher.finished(child.cell, said)
                if waiting:
                    child.cell, child.began = waiting.popleft(), time.perf_counter()
                    with contextlib.suppress(BrokenPipeError):  # it died just now: recv will say so
                        child.pipe.send(child.cell)
                    watcher.started(child.cell)
                else:
                    del children[child.pipe]
                    _end(child)
    finally:
        for child in children.values():
            _end(child)


def _start(source: Source, threads: int, cell: Cell) -> _Child:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, source, threads), daemon=True)
    with _ctrl_c_ignored():
        process.start()
    theirs.close()  # so that the pipe ends when the child does
    pipe.send(cell)
    return _Child(process, pipe, cell, time.perf_counter())


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """What is started inside never sees Ctrl-C, which a terminal sends to all: the parent decides."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(child: _Child) -> None:
    child.process.kill()
    child.process.join()
    child.pipe.close()


def _died(child: _Child) -> Result:
    child.process.join()
    child.pipe.close()
    code = child.process.exitcode or 0
    if code == -signal.SIGKILL:
        why = "was killed (SIGKILL), most likely because memory ran out: use fewer workers or a shorter task"
    elif code < 0:
        why = f"crashed ({signal.Signals(-code).name}): run this cell without workers to see more"
    else:
        why = f"ended with exit code {code}: run this cell without workers to see more"
    return failed(FoveateError(f"the worker process {why}."), child.began)


def _child(pipe: Connection, source: Source, threads: int) -> None:
    """Take cells from the pipe and send their results back, until the parent ends it or is gone."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    seat, told = Seat(source.open), 0.0

    def tell(fraction: float) -> None:
        nonlocal told
        if time.perf_counter() - told > PROGRESS_SECONDS:
            told = time.perf_counter()
            pipe.send(float(fraction))

    while True:
        pipe.send(seat.run(pipe.recv(), tell))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in children only
    parent.join()
    os._exit(1)
