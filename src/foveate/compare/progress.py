"""What a run shows while it works: bars in a terminal, otherwise a line for each finished cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from foveate.compare.frontier import QUALITIES
from foveate.compare.grid import Cell
from foveate.compare.seat import Result

ENOUGH = 0.1
"""The fraction of a cell from which on its time so far says something about the rest."""


class Estimate:
    """How long the cells that are left will take, from their costs and how long the same task's cells took.

    Args:
        cells: those to be run.
        cost: of a cell, in any unit.
        lanes: how many run at a time.
        clock: gives the time in seconds.

    Example:
        >>> a, b = (Cell("tiny", recipe, "perplexity", {}) for recipe in ("full", "window"))
        >>> estimate = Estimate([a, b], cost=lambda cell: 1.0, lanes=1, clock=lambda: 0.0)
        >>> estimate.finished(a, seconds=20.0)
        >>> estimate.seconds_left(), estimate.done
        (20.0, 0.5)
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        cost: Callable[[Cell], float],
        lanes: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._costs = {cell: cost(cell) for cell in cells}
        self._total = sum(self._costs.values())
        self._lanes, self._clock = lanes, clock
        self._running: dict[Cell, tuple[float, float]] = {}  # when it started, the fraction done
        self._spent: dict[str, tuple[float, float]] = {}  # of each task: seconds, cost

    def started(self, cell: Cell) -> None:
        self._running[cell] = (self._clock(), 0.0)

    def progressed(self, cell: Cell, fraction: float) -> None:
        self._running[cell] = (self._running[cell][0], fraction)

    def finished(self, cell: Cell, seconds: float, *, ok: bool = True) -> None:
        self._running.pop(cell, None)
        cost = self._costs.pop(cell)
        if ok:  # how soon a cell fails says nothing about the others
            self._add(self._spent, cell.task, seconds, cost)

    @staticmethod
    def _add(spent: dict[str, tuple[float, float]], task: str, seconds: float, cost: float) -> None:
        before = spent.get(task, (0.0, 0.0))
        spent[task] = (before[0] + seconds, before[1] + cost)

    @property
    def done(self) -> float:
        """The fraction of all work."""
        left = sum(cost * (1 - self._running.get(cell, (0, 0.0))[1]) for cell, cost in self._costs.items())
        return 1 - left / self._total

    def seconds_left(self) -> float | None:
        """None as long as nothing is known."""
        spent = dict(self._spent)
        for cell, (start, fraction) in self._running.items():
            if fraction >= ENOUGH:
                self._add(spent, cell.task, self._clock() - start, fraction * self._costs[cell])
        if not spent:
            return None
        overall = sum(seconds for seconds, _ in spent.values()) / sum(cost for _, cost in spent.values())
        rates = {task: seconds / cost for task, (seconds, cost) in spent.items()}
        left = (
            rates.get(cell.task, overall) * cost * (1 - self._running.get(cell, (0, 0.0))[1])
            for cell, cost in self._costs.items()
        )
        return sum(left) / self._lanes


class Board:
    """Shows a run on the standard error, as a `Watcher` of it; the standard output stays for results.

    Args:
        cells: the whole grid's number of cells.
        missing: those to be run now.
        cost: of a cell, in any unit.
        lanes: how many run at a time.
        show: False: say nothing.
    """

    def __init__(self, cells: int, missing: Sequence[Cell], cost: Callable[[Cell], float], lanes: int, show: bool):
        self._cells, self._done, self._show = cells, cells - len(missing), show
        self._estimate = Estimate(missing, cost, lanes)
        self._console = Console(stderr=True, quiet=not show, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}", table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[note]}", table_column=Column(min_width=16, no_wrap=True)),
            console=self._console,
            expand=True,
            transient=True,
            disable=not (show and self._console.is_terminal),
        )
        self._all = self._bars.add_task("", total=1.0, note="")
        self._rows: dict[Cell, TaskID] = {}

    def __enter__(self) -> Board:
        self._bars.start()
        self._update()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, cell: Cell) -> None:
        self._estimate.started(cell)
        name = escape(f"{cell.task} · {cell.recipe}")
        self._rows[cell] = self._bars.add_task(name, total=1.0, note="")

    def progressed(self, cell: Cell, fraction: float) -> None:
        self._estimate.progressed(cell, fraction)
        self._bars.update(self._rows[cell], completed=fraction, note=f"{fraction:.0%}")
        self._update()

    def finished(self, cell: Cell, result: Result) -> None:
        self._done += 1
        self._estimate.finished(cell, result["seconds"], ok=result["status"] == "ok")
        if cell in self._rows:
            self._bars.remove_task(self._rows.pop(cell))
        self._update()
        left = "" if self._bars.live.is_started or self._done == self._cells else f" ({self._left()})"
        self._console.print(
            f"[{self._done}/{self._cells}] {cell.task} · {cell.recipe}: {_outcome(result)}, "
            f"{result['seconds']:.1f} s{left}",
            markup=False,
            style="red" if result["status"] == "failed" else None,
            soft_wrap=True,
        )

    def _update(self) -> None:
        count = f"{self._done} of {self._cells} cells"
        self._bars.update(self._all, completed=self._estimate.done, note=self._left(), description=count)

    def _left(self) -> str:
        seconds = self._estimate.seconds_left()
        if seconds is None:
            return "estimating"
        if seconds < 90:
            return f"about {max(1, round(seconds))} s left"
        if seconds < 5400:
            return f"about {seconds / 60:.0f} min left"
        return f"about {seconds / 3600:.1f} h left"


def _outcome(result: Result) -> str:
    """The most telling figure of a cell, or why it failed."""
    metrics = result["metrics"]
    if result["status"] == "failed":
        return f"failed: {result['reason']}"
    name = next((name for name in (*QUALITIES, "decode_speedup", *metrics) if name in metrics), None)
    return "done" if name is None else f"{name.replace('_', ' ')} {metrics[name]['value']:.4g}"
