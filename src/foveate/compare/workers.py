"""Where cells run: in child processes, which are replaced when they die."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from foveate.compare.grid import Cell
from foveate.compare.seat import Place, Result, Watcher, failed
from foveate.errors import FoveateError

PROGRESS_SECONDS = 0.2
"""How often at most a child process tells how far it is."""

GRACE_SECONDS = 5.0
"""How long a child process may take to leave when it is asked to."""


@dataclass
class _Child:
    """A child process, this end of the pipe to it, and the cell that it is at."""

    process: BaseProcess
    pipe: Connection
    cell: Cell
    began: float


def in_children(cells: Sequence[Cell], source: Place, count: int, watcher: Watcher) -> None:
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
                    _end([child])
    finally:
        _end(children.values())


def _start(source: Place, threads: int, cell: Cell) -> _Child:
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


def _end(children: Collection[_Child]) -> None:
    """Ask them to leave, which takes a moment; who doesn't is killed."""
    for child in children:
        child.process.terminate()
    for child in children:
        child.process.join(GRACE_SECONDS)
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


def _child(pipe: Connection, source: Place, threads: int) -> None:
    """Take cells from the pipe and send their results back, until the parent ends it or is gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # orderly, unlike the default
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    seat, told = source.seat(), 0.0

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
