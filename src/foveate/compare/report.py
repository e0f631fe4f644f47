"""The page: one HTML file that opens offline. What it shows is chosen here, how it looks is in page.html.j2."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, FileSystemLoader

from foveate.compare.charts import curve_chart, frontier_chart, looks
from foveate.compare.frontier import QUALITIES, Figure, Row, advice, frontier, summarise
from foveate.errors import FoveateError

Cell = Mapping[str, Any]
Column = tuple[str, str | None]
"""A metric, and the task that measured it; None where any task's measurement will do."""

LABELS = {  # the table's columns in this order; whatever else a task measures comes after them, by name
    "perplexity": "perplexity",
    "passkey": "passkeys answered",
    "copy_surprisal_ratio": "copy surprisal",
    "copy_surprisal_ratio_permuted": "copy surprisal, permuted",
    "copy_surprisal_ratio_novel": "copy surprisal, novel",
    "cache_fraction": "cache",
    "cache_bytes": "cache held",
    "decode_speedup": "decoding",
    "prefill_speedup": "prefill",
    "decode_tokens_per_second": "decoded tokens/s",
    "peak_memory_bytes": "peak memory",
    "parameters": "parameters",
}
UNSHOWN = {"perplexity_ratio", "prefill_seconds", "prefill_tokens_per_second", "tokens", "held_fraction", "distinct_2"}
ONCE = {"cache_fraction", "cache_bytes", "parameters"}  # most tasks measure these; the first one's stand in the table
PERCENT = {"passkey", "cache_fraction"}
COSTS = {"cache_fraction": ("cache", "share of the full cache held"), "decode_speedup": ("speed", "decoding, times full")}


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
    page = render(cells)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(page.encode("utf-8", "replace"))
        os.replace(unfinished, out)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise FoveateError(f"The report can't be written to {out}: {error.strerror}. Name another place.") from error
    return out


def read_cells(run: Path) -> list[Cell]:
    """The cells of a run folder, in grid order where results.jsonl tells it, otherwise as they were finished."""
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

    folder = Path(__file__).parent
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    bundle = vl_convert.javascript_bundle(vl_version=version)
    script = f"(() => {{{bundle}}})();\n{(folder / 'page.js').read_text(encoding='utf-8')}"
    template = Environment(loader=FileSystemLoader(folder), autoescape=True).get_template("page.html.j2")
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
        style=(folder / "page.css").read_text(encoding="utf-8"),
        table={name: [_entry(row, *column) for column in columns] for name, row in rows.items()},
    )


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
    value, interval = _texts(metric, figure)
    return {"sort": figure.value, "text": value, "interval": interval, "change": _change(row, metric, task)}


def _frontiers(rows: Mapping[str, Row], columns: Sequence[Column], look: Any) -> list[dict[str, Any]]:
    charts = []
    for quality, task in (column for column in columns if column[0] in QUALITIES):
        for cost, (short, x_title) in COSTS.items():
            by_model: dict[str, list[Row]] = {}
            for row in rows.values():
                by_model.setdefault(row.model, []).append(row)
            best = [row for group in by_model.values() for row in frontier(group, cost, quality, task)]
            points = []
            for name, row in rows.items():
                x, y = row.cost(cost, task), row.figure(quality, task)
                if x and y and math.isfinite(x.value) and math.isfinite(y.value):
                    points.append({
                        "recipe": name, "name": name, "model": row.model, "full": row.recipe == "full", "best": row in best,
                        **_ends("x", x), **_ends("y", y), "cost": " ".join(_texts(cost, x)),
                        "quality": " ".join(_texts(quality, y)), "change": _change(row, quality, task) or "–",
                    })
            if len(points) > 1:
                title = f"{LABELS[quality].capitalize()} against {short}"
                percent = (cost in PERCENT, quality in PERCENT)
                spec = frontier_chart(points, look, title=title, x=x_title, y=LABELS[quality], percent=percent)
                charts.append({"kind": "frontier", "title": title, "task": task, "spec": spec})
    return charts


def _ends(axis: str, figure: Figure) -> dict[str, float]:
    def known(end: float | None) -> float:
        return figure.value if end is None or not math.isfinite(end) else end

    return {axis: figure.value, f"{axis}_low": known(figure.low), f"{axis}_high": known(figure.high)}


def _curves(cells: Sequence[Cell], look: Any) -> list[dict[str, Any]]:
    charts = []
    for task, group in _by_task(cells, "curve").items():
        points = []
        for cell in group:
            curve = cell["artifacts"]["curve"]
            line = [(x, y) for x, y in zip(curve["x"], curve["y"], strict=True) if math.isfinite(y)]
            points += [{"recipe": cell["label"], "name": cell["label"], "x": x, "y": y} for x, y in line]
        if points:
            x, y = curve["x_name"], curve["y_name"]
            title = f"{y.capitalize()} along the text"
            spec = curve_chart(points, look, title=title, x=x, y=y)
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


def _texts(metric: str, figure: Figure) -> tuple[str, str]:
    """A figure and its interval in people's units; the interval is empty where there is none."""
    value = _number(metric, figure.value, 4 if metric == "perplexity" else 3)
    if figure.low is None or figure.high is None or figure.low == figure.high:
        return value, ""
    return value, f"[{_number(metric, figure.low, 3)}, {_number(metric, figure.high, 3)}]"


def _number(metric: str, value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else "∞"
    if metric in PERCENT:
        return f"{100 * value:.{0 if value >= 0.0995 or value == 0 else 1}f}%"
    if metric.endswith("_speedup"):
        return f"{value:.2f}x"
    if metric.endswith("_bytes"):
        return f"{_significant(value / 2**20, digits)} MiB"
    if metric == "parameters":
        return f"{_significant(value / 1e6, 4)} M"
    return _significant(value, digits)


def _significant(value: float, digits: int) -> str:
    """`digits` significant digits, never in the 1e+03 form."""
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, places):,.{max(places, 0)}f}"


def _change(row: Row, metric: str, task: str | None) -> str:
    """A figure against that of full; nothing for full itself and for what is not a quality."""
    change = row.changes.get(task or "", {}).get(metric)
    if change is None or row.recipe == "full" or not math.isfinite(change.value):
        return ""
    if not change.real:
        return "≈ full"
    if metric == "perplexity":
        return f"{change.value:.3g}x full" if change.value >= 2 else _signed(100 * (change.value - 1), 1) + "%"
    if metric in PERCENT:
        return _signed(100 * change.value, 0) + " points"
    return _signed(change.value, 2)


def _signed(value: float, places: int) -> str:
    return f"{value:+.{places}f}".replace("-", "−")
