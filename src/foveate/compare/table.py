"""The table at the end of a run: a row for each recipe, what it kept and what it saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from foveate.compare.frontier import QUALITIES, Row, summarise
from foveate.compare.words import LABELS, UNSHOWN

COSTS = {"cache_fraction": "cache", "decode_speedup": "decoding"}


def table(cells: Iterable[Mapping[str, Any]]) -> Table:
    """The table of finished cells, for `rich.print`.

    A perplexity is followed by its change against `full`, in brackets where it lies inside its interval.

    Example:
        >>> cell = {"model": "tiny", "task": "perplexity", "recipe": "full", "status": "ok"}
        >>> shown = table([cell | {"metrics": {"perplexity": {"value": 10, "low": 9, "high": 11}}}])
        >>> shown.row_count, [column.header for column in shown.columns]
        (1, ['recipe', 'perplexity'])
    """
    rows = summarise(cells)
    tasks = dict.fromkeys(task for row in rows for task in row.figures)
    columns = [(metric, task) for task in tasks for metric in _qualities(rows, task)]
    costs = [metric for metric in COSTS if any(row.figure(metric) for row in rows)]
    shown = Table(box=SIMPLE_HEAD)
    shown.add_column("recipe", no_wrap=True)
    for metric, task in columns:
        label = LABELS.get(metric, metric.replace("_", " "))
        alone = [name for name, _ in columns].count(metric) == 1
        shown.add_column(label if alone else f"{label}, {task}", justify="right")
    for metric in costs:
        shown.add_column(COSTS[metric], justify="right")
    for row in rows:
        shown.add_row(
            Text(row.recipe.replace("+", "\n+")),
            *(_quality(row, metric, task) for metric, task in columns),
            *(_cost(row, metric) for metric in costs),
        )
    return shown


def _qualities(rows: Iterable[Row], task: str) -> list[str]:
    """What a task says of quality: the known metrics, and those that foveate knows nothing about."""
    measured = dict.fromkeys(metric for row in rows for metric in row.figures.get(task, {}))
    return [metric for metric in measured if metric in QUALITIES or metric not in LABELS.keys() | UNSHOWN]


def _quality(row: Row, metric: str, task: str) -> str:
    if task in row.failures:
        return "failed"
    figure = row.figures.get(task, {}).get(metric)
    if figure is None:
        return "-"
    if metric == "passkey":
        return f"{figure.value:.0%}"
    change = row.changes.get(task, {}).get(metric)
    if metric != "perplexity" or change is None or row.recipe == "full":
        return f"{figure.value:.4g}"
    percent = f"{change.value - 1:+.1%}" if change.value < 10 else f"x{change.value:.3g}"
    return f"{figure.value:.4g} {percent if change.real else f'({percent})'}"


def _cost(row: Row, metric: str) -> str:
    figure = row.figure(metric)
    if figure is None:
        return "failed" if row.failures else "-"
    return f"{figure.value:.0%}" if metric == "cache_fraction" else f"{figure.value:.2f}x"
