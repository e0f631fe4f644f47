"""The page: one HTML file that opens offline. Here is what it shows; how it looks is in page.html.j2."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, FileSystemLoader

from foveate.compare.charts import Look, curve_chart, frontier_chart, looks
from foveate.compare.frontier import QUALITIES, Figure, Row, advice, frontier, summarise
from foveate.compare.words import LABELS, PERCENT, UNSHOWN, change_text, texts
from foveate.errors import FoveateError

HERE = Path(__file__).parent

Cell = Mapping[str, Any]
Column = tuple[str, str | None]
"""A metric, and the task that measured it; None where any task's measurement will do."""

ONCE = {
    "cache_fraction",
    "cache_bytes",
    "parameters",
}  # most tasks measure these: the table has the first one's
COSTS = {
    "cache_fraction": ("cache", "share of the full cache held"),
    "decode_speedup": ("speed", "decoding, times full"),
}


def write_report(run: Path | Sequence[Cell], out: Path) -> Path:
    """Write the page of a run, in one piece or not at all, and return where it is.

    Args:
        run: a run folder, or its cells with their artifacts.
        out: the file to write.

    Raises:
        FoveateError: there is no cell to show, or the file can't be written.

    Example:
        >>> import tempfile
        >>> cell = {"model": "tiny", "recipe": "full", "task": "perplexity", "status": "failed",
        ...         "reason": "Out of memory.", "seconds": 1.0, "setting": {}, "metrics": {}}
        >>> write_report([cell], Path(tempfile.mkdtemp()) / "report.html").name
        'report.html'
    """
    cells = read_cells(run) if isinstance(run, str | Path) else list(run)
    if not cells:
        raise FoveateError("A report was asked for, but no cell is finished yet: let `foveate compare` run first.")
    return write_page(render(cells), out)


def write_page(page: str, out: Path) -> Path:
    """Write a page in one piece or not at all, and return where it is.

    Raises:
        FoveateError: the file can't be written.
    """
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(page.encode("utf-8", "replace"))
        os.replace(unfinished, out)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise FoveateError(f"The report can't be written to {out}: {error.strerror}. Name another place.") from error
    return out


def read_cells(run: Path) -> list[Cell]:
    """The cells of a run folder, in grid order where results.jsonl tells it, else as they were finished."""
    paths = sorted(Path(run, "cells").glob("*.json"), key=lambda path: path.stat().st_mtime)
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    results = Path(run, "results.jsonl")
    if results.exists():
        lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        order = [(line["model"], line["recipe"], line["task"]) for line in lines]
        keyed = {(cell["model"], cell["recipe"], cell["task"]): cell for cell in cells}
        cells = [keyed[key] for key in order if key in keyed]
    return cells


def render(cells: Sequence[Cell]) -> str:
    """The page as text."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))

    def label(model: str, recipe: str) -> str:
        return recipe if len(models) == 1 else f"{model} · {recipe}"

    cells = [{**cell, "label": label(cell["model"], cell["recipe"])} for cell in cells]
    rows = {label(row.model, row.recipe): row for row in summarise(cells)}
    done = [cell for cell in cells if cell["status"] == "ok"]
    look = looks({name: row.recipe == "full" for name, row in rows.items()})
    columns = _columns(rows)
    charts = _frontiers(rows, columns, look) + _curves(done, look)
    said = advice(cells)

    script = page_script()
    template = Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("page.html.j2")
    return template.render(
        advice=said[0].upper() + said[1:],
        charts=[{**chart, "index": index} for index, chart in enumerate(charts)],
        columns=[(LABELS.get(metric, metric), _arguments(task or "")) for metric, task in columns],
        failed=[cell for cell in cells if cell["status"] == "failed"],
        finished=len(done),
        held=_held(done),
        look=look,
        models=models,
        passkeys=_passkeys(done),
        samples=_samples(done),
        # The browser runs this script and no other, even if a text slipped through unescaped.
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        seconds=sum(cell["seconds"] for cell in cells),
        setting=_setting(cells),
        specs=[chart["spec"] for chart in charts],
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        table={name: [_entry(row, *column) for column in columns] for name, row in rows.items()},
    )


@functools.cache
def page_script() -> str:
    """The page's script with the libraries that it uses."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return vl_convert.javascript_bundle((HERE / "page.js").read_text(encoding="utf-8"), version)


def _columns(rows: Mapping[str, Row]) -> list[Column]:
    measured: dict[str, dict[str, None]] = {}  # metric -> its tasks, in order
    for row in rows.values():
        for task, figures in row.figures.items():
            for metric in figures.keys() - UNSHOWN:
                measured.setdefault(metric, {})[task] = None
    order = [metric for metric in LABELS if metric in measured] + sorted(measured.keys() - LABELS.keys())
    return [(metric, task) for metric in order for task in ([None] if metric in ONCE else measured[metric])]


def _entry(row: Row, metric: str, task: str | None) -> dict[str, Any]:
    """One field of the table: what it is sorted by, its texts, and whether it failed."""
    figure = row.figure(metric, task)
    if figure is None:
        return {"sort": "", "text": "failed" if task in row.failures else "–", "failed": task in row.failures}
    value, interval = texts(metric, figure)
    return {
        "sort": figure.value,
        "text": value,
        "interval": interval,
        "change": change_text(row, metric, task),
    }


def _frontiers(rows: Mapping[str, Row], columns: Sequence[Column], look: Look) -> list[dict[str, Any]]:
    """A chart for each quality that a task measured, against each cost."""
    groups: dict[str, list[Row]] = {}
    for row in rows.values():
        groups.setdefault(row.model, []).append(row)
    charts = []
    for quality, task in (column for column in columns if column[0] in QUALITIES):
        for cost, (short, x_title) in COSTS.items():
            best = [row for group in groups.values() for row in frontier(group, cost, quality, task)]
            points = [
                {
                    "recipe": name,
                    "name": name,
                    "model": row.model,
                    "full": row.recipe == "full",
                    "best": row in best,
                    **_ends("x", x),
                    **_ends("y", y),
                    "cost": " ".join(texts(cost, x)).strip(),
                    "quality": " ".join(texts(quality, y)).strip(),
                    "change": change_text(row, quality, task) or "–",
                }
                for name, row in rows.items()
                if (x := row.cost(cost, task)) and (y := row.figure(quality, task))
            ]
            if len(points) > 1:
                title = f"{LABELS[quality].capitalize()} against {short}"
                words = {"title": title, "x": x_title, "y": LABELS[quality]}
                spec = frontier_chart(points, look, **words, percent=(cost in PERCENT, quality in PERCENT))
                charts.append({"kind": "frontier", "title": title, "task": task, "spec": spec})
    return charts


def _ends(axis: str, figure: Figure) -> dict[str, float]:
    low, high = (figure.value if end is None else end for end in (figure.low, figure.high))
    return {axis: figure.value, f"{axis}_low": low, f"{axis}_high": high}


def _curves(cells: Sequence[Cell], look: Look) -> list[dict[str, Any]]:
    """A chart for each task that measured along the text."""
    charts = []
    for task, group in _by_task(cells, "curve").items():
        curves = {cell["label"]: cell["artifacts"]["curve"] for cell in group}
        points = [
            {"recipe": name, "name": name, "x": x, "y": y}
            for name, curve in curves.items()
            for x, y in zip(curve["x"], curve["y"], strict=True)
            if y is not None  # JSON's word for a number that overflowed
        ]
        if not points:
            continue
        x_title, y_title = (group[0]["artifacts"]["curve"][each] for each in ("x_name", "y_name"))
        title = f"{y_title.capitalize()} along the text"
        spec = curve_chart(points, look, title=title, x=x_title, y=y_title)
        charts.append({"kind": "curve", "title": title, "task": task, "spec": spec})
    return charts


def _samples(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each prompt what each recipe wrote."""
    prompts: dict[tuple[str, str], list[dict[str, str]]] = {}
    for task, group in _by_task(cells, "samples").items():
        for cell in group:
            for sample in cell["artifacts"]["samples"]:
                texts = prompts.setdefault((task, sample["prompt"]), [])
                texts.append({"label": cell["label"], "text": sample["text"]})
    return [{"task": task, "prompt": prompt, "texts": texts} for (task, prompt), texts in prompts.items()]


def _passkeys(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each task the depths, and for each recipe its cases at each depth."""
    tables = []
    for task, group in _by_task(cells, "cases").items():
        depths = sorted({case["depth"] for cell in group for case in cell["artifacts"]["cases"]})
        recipes = {
            cell["label"]: [[case for case in cell["artifacts"]["cases"] if case["depth"] == depth] for depth in depths]
            for cell in group
        }
        tables.append({"task": task, "depths": [f"{100 * depth:.0f}%" for depth in depths], "recipes": recipes})
    return tables


def _held(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each passage its tokens, and for each recipe by how many heads each of them is held."""
    passages: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for task, group in _by_task(cells, "held").items():
        for cell in group:
            held = cell["artifacts"]["held"]
            recipes = passages.setdefault((task, tuple(held["tokens"])), [])
            recipes.append({"label": cell["label"], "heads": held["heads"], "of": held["of"]})
    return [{"task": task, "tokens": tokens, "recipes": recipes} for (task, tokens), recipes in passages.items()]


def _by_task(cells: Sequence[Cell], artifact: str) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.get("artifacts", {}).get(artifact):
            groups.setdefault(cell["task"], []).append(cell)
    return groups


def _setting(cells: Sequence[Cell]) -> dict[str, str]:
    """Each entry of the cells' settings, with all the values it took."""
    values: dict[str, dict[str, None]] = {}
    for cell in cells:
        for name, value in cell["setting"].items():
            values.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(each) for name, each in values.items()}


def _arguments(task: str) -> str:
    """The part of a task's text after its name, spaced so that it can break."""
    return task.partition(":")[2].replace(",", ", ")
