"""Runs what is missing of a grid, and keeps what is finished whatever happens."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from foveate.compare.grid import Cell
from foveate.compare.progress import Board
from foveate.compare.ray_workers import connected, on_ray
from foveate.compare.seat import Place, Result, Runs, Watcher, in_this_process
from foveate.compare.store import RunFolder
from foveate.compare.workers import in_children

TIMED = ("speed",)
"""Tasks whose result is a time: their cells run last and alone, so that no other cell slows them down."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM.

    Attributes:
        finished, cells: how many cells of how many are finished; they are stored.
    """

    def __init__(self, finished: int, cells: int):
        super().__init__(f"stopped with {finished} of {cells} cells finished: the same command goes on there.")
        self.finished, self.cells = finished, cells


def run(
    folder: RunFolder,
    place: Place,
    *,
    seat: Runs | None = None,
    workers: int = 0,
    ray: str | None = None,
    show: bool = True,
) -> None:
    """Run the cells that are missing in a folder, and store each as soon as it is finished.

    Args:
        folder: with the grid planned.
        place: what workers or Ray get who runs cells from.
        seat: who runs them in this process, where there are neither; else the place's.
        workers: how many child processes.
        ray: the address of a Ray cluster.
        show: tell on the standard error how far the run is.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; cells in flight are lost, all others are stored.
        FoveateError: the folder can't be written any more, or there is no such cluster.
    """
    missing = folder.missing()
    if not missing:
        return
    timed = [cell for cell in missing if cell.task.partition(":")[0] in TIMED]
    others = [cell for cell in missing if cell not in timed]
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_sigterm_as_ctrl_c())
            lanes = max(1, workers)
            if ray is not None:
                cluster = stack.enter_context(connected(ray))
                lanes = int(cluster.cluster_resources()["CPU"])
            watcher = _Storing(folder, stack.enter_context(Board(len(folder.cells), missing, place.cost, lanes, show)))
            for cells, at_once in ((others, lanes), (timed, 1)):
                if ray is not None:
                    on_ray(cluster, cells, place, at_once, watcher)
                elif workers:
                    in_children(cells, place, at_once, watcher)
                else:
                    seat = seat or place.seat()
                    in_this_process(cells, seat, watcher)
    except KeyboardInterrupt as error:
        raise Interrupted(len(folder.cells) - len(folder.missing()), len(folder.cells)) from error


class _Storing(Watcher):
    """Stores each cell as it finishes, before it is shown."""

    def __init__(self, folder: RunFolder, board: Board):
        self._folder, self._board = folder, board

    def started(self, cell: Cell) -> None:
        self._board.started(cell)

    def progressed(self, cell: Cell, fraction: float) -> None:
        self._board.progressed(cell, fraction)

    def finished(self, cell: Cell, result: Result) -> None:
        self._folder.put(cell, result)
        self._board.finished(cell, result)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM ends a run as orderly as Ctrl-C does (signal handlers exist in main threads only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
