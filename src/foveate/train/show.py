"""What training shows while it works: a bar in a terminal, otherwise a line now and then; on the standard error."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Show:
    """The progress of one training.

    Args:
        progress: True: show; False: say nothing; a function: called with the fraction done, 0 to 1, and nothing shown.
        verb: what lines begin with.
    """

    def __init__(self, progress: bool | Callable[[float], None], verb: str = "heal"):
        self._verb = verb
        self._call = progress if callable(progress) else None
        self._console = Console(stderr=True, quiet=progress is not True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            expand=True,
            transient=True,
            disable=not (progress is True and self._console.is_terminal),
        )
        self._row = self._bar.add_task("train", total=1.0, note="")
        self._last = -LINE_EVERY

    def __enter__(self) -> Show:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(f"{self._verb}: {line}", markup=False, soft_wrap=True)

    def at(self, what: str, done: float, note: str) -> None:
        """How far it is: what is being done, the fraction of it, and figures."""
        if self._call is not None:
            self._call(done)
        self._bar.update(self._row, description=what, completed=done, note=note)
        if not self._bar.live.is_started and (time.monotonic() - self._last >= LINE_EVERY or done >= 1):
            self._last = time.monotonic()
            self.say(f"{what} {done:.0%}, {note}")


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> from foveate.train.show import duration
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
