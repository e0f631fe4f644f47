"""A bar in the terminal while something is measured; nothing where there is none."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Shown:
    """Shows how far a measurement is, and the time left, while the `with` block lasts.

    Example:
        >>> with Shown("heads") as progress:
        ...     progress(0.5)
    """

    def __init__(self, what: str, once: bool = True):
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._what = f"foveate: measuring {what}{' (once a model)' if once else ''}"
        self._task = self._bar.add_task(self._what, total=1.0)

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __call__(self, done: float, note: str = "") -> None:
        """The fraction that is done, and what else is to be seen, such as a loss."""
        self._bar.update(self._task, completed=done, description=f"{self._what} {note}")

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
