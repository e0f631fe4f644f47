"""What a search shows while it works."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from foveate.search.goals import Goal
from foveate.search.walk import Taken

LINE_EVERY = 20.0
"""Seconds between lines about the first round, where there is no terminal."""


class Shown:
    """A bar in a terminal, with the time left; otherwise a line for each step taken, and for what takes long."""

    def __init__(self, show: bool):
        self._console = Console(stderr=True, quiet=not show, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, console=self._console, transient=True, disable=not (show and self._console.is_terminal)
        )
        self._task = self._bar.add_task("foveate", total=1.0)
        self._taken = 0
        self._last = time.monotonic()

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        self._bar.update(self._task, description=what, completed=0)
        self._line(what)

    def _line(self, words: str) -> None:
        if not self._bar.live.is_started:
            self._last = time.monotonic()
            self._console.print(words, markup=False, soft_wrap=True)

    def done(self, fraction: float) -> None:
        self._bar.update(self._task, completed=fraction)

    def walked(self, goal: Goal, start: float, taken: list[Taken], measured: int, missing: int, rounds: int) -> None:
        if taken:
            last = taken[-1]
            each = (measured - taken[0].measured) / max(1, len(taken) - 1)
            if rounds >= 0:
                left = missing + rounds * each
                self._bar.update(self._task, completed=measured / (measured + left))
            words = f"{goal.words(last.amount)}, loss {last.loss:.3g}"
            self._bar.update(self._task, description=f"{len(taken)} steps: {words}")
            if len(taken) > self._taken:
                self._line(f"[{len(taken)}] {last.name}: {words}")
            self._taken = len(taken)
        else:
            self._bar.update(self._task, description="measuring first steps", completed=measured / (measured + missing))
            if time.monotonic() - self._last >= LINE_EVERY:
                self._line(f"measuring first steps: {measured} of {measured + missing}")
