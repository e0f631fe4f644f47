"""Where cells run: as tasks on a Ray cluster, whose nodes may die."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from foveate.compare.grid import Cell
from foveate.compare.seat import Place, Result, Runs, Watcher, failed
from foveate.errors import FoveateError

RETRIES = 3
"""How often a cell is started again when the node or process that it was on died."""


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Inside, the ray module, connected to the cluster at `address`; whoever was connected already stays so.

    Args:
        address: "local" (a cluster of this machine alone, for this run), "auto" (the one that this machine is
            part of), or "host:port".

    Raises:
        FoveateError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise FoveateError("--ray needs Ray, which is not installed: pip install 'foveate[ray]'.") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise FoveateError(
            f"there is no Ray cluster to reach at {address!r} ({' '.join(str(error).split())}): "
            "start one with `ray start --head`, or say --ray local."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def on_ray(ray: Any, cells: Sequence[Cell], source: Place, at_once: int, watcher: Watcher) -> None:
    """Run cells as Ray tasks, `at_once` at most, each on a CPU core (and a GPU where the run is on GPUs)."""
    gpus = 1 if source.device.startswith("cuda") else 0
    run = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_run)
    shared, waiting = ray.put(source), deque(cells)
    running: dict[Any, tuple[Cell, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                cell = waiting.popleft()
                running[run.remote(shared, cell)] = (cell, time.perf_counter())
            for done in ray.wait(list(running))[0]:
                cell, began = running.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.RayError as error:
                    said = " ".join(str(getattr(error, "cause", error)).split())
                    result = failed(
                        FoveateError(f"Ray could not finish this cell, {RETRIES} retries included: {said}"),
                        began,
                    )
                watcher.finished(cell, result)
    finally:
        for left in running:
            ray.cancel(left, force=True)


def _run(source: Place, cell: Cell) -> Result:
    """On a node of the cluster."""
    return _seat(source).run(cell, lambda fraction: None)


@functools.lru_cache(maxsize=1)
def _seat(source: Place) -> Runs:
    """One model a process: Ray uses a process for many cells."""
    return source.seat()
