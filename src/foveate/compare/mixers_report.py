"""The page of a comparison of mixers: quality against state and speed, memory against length, losses."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from foveate.compare.charts import curve_chart, frontier_chart, looks
from foveate.compare.mixers import Row, advice_of, rows_of
from foveate.compare.report import HERE, page_script, write_page
from foveate.errors import FoveateError

COSTS: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "state": ("bytes of state", lambda row: row.state_bytes),
    "training speed": ("training, tokens/s", lambda row: row.train_tokens_per_second),
    "decoding speed": ("decoding, tokens/s", lambda row: row.decode_tokens_per_second),
}


def write(cells: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Write the page, in one piece or not at all, and return where it is.

    Raises:
        FoveateError: there is no cell to show, or the file can't be written.
    """
    if not cells:
        raise FoveateError("a report was asked for, but no cell is finished yet.")
    return write_page(render(cells), out)


def render(cells: Sequence[Mapping[str, Any]]) -> str:
    """The page as text."""
    rows = rows_of(cells)
    look = looks({row.mixer: False for row in rows})
    charts = [chart for task in dict.fromkeys(row.task for row in rows) for chart in _charts(task, rows, look)]
    script = page_script()
    template = Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("page_mixers.html.j2")
    first = cells[0]
    return template.render(
        advice=advice_of(rows),
        charts=[{**chart, "index": index} for index, chart in enumerate(charts)],
        failed=[row for row in rows if row.quality is None],
        finished=sum(cell["status"] == "ok" for cell in cells),
        look=look,
        model=first["model"],
        rows=rows,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        seconds=sum(cell["seconds"] for cell in cells),
        seeds=len({cell["setting"]["seed"] for cell in cells}),
        setting=_setting(first["setting"]),
        specs=[chart["spec"] for chart in charts],
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        total=len(cells),
    )


def _setting(setting: Mapping[str, Any]) -> dict[str, str]:
    flat = {**setting["sizes"], **setting["settings"], **setting}
    return {key: str(value) for key, value in flat.items() if key not in ("sizes", "settings", "seed")}


def _charts(task: str, rows: Sequence[Row], look: Any) -> list[dict[str, Any]]:
    there = [row for row in rows if row.task == task and row.quality is not None]
    charts = []
    for name, (title, cost) in COSTS.items():
        points = [_point(row, cost(row)) for row in there if cost(row) is not None]
        if len(points) < 2:
            continue
        percent = there[0].better == "accuracy"
        best = _unbeaten(points, cheaper=name == "state", higher=there[0].higher)
        points = [{**point, "best": point["name"] in best} for point in points]
        said = f"{there[0].better.capitalize()} against {name}"
        spec = frontier_chart(points, look, title=said, x=title, y=there[0].better, percent=(False, percent))
        charts.append({"kind": "frontier", "title": said, "task": task, "spec": spec})
    lines: dict[str, tuple[str, str, dict[str, Any]]] = {
        "Memory against length": (
            "tokens",
            "bytes of state",
            {row.mixer: zip(row.memory["x"], row.memory["y"], strict=True) for row in there if row.memory},
        ),
        "Loss in training": ("step", "loss", {row.mixer: row.losses for row in there}),
    }
    for title, (x, y, curves) in lines.items():
        dots = [
            {"recipe": mixer, "name": mixer, "x": at, "y": value}
            for mixer, curve in curves.items()
            for at, value in curve
            if value > 0
        ]
        if dots:
            spec = curve_chart(dots, look, title=title, x=x, y=y)
            charts.append({"kind": "curve", "title": title, "task": task, "spec": spec})
    return charts


def _point(row: Row, cost: float | None) -> dict[str, Any]:
    assert row.quality is not None and cost is not None
    quality = row.quality
    return {
        "recipe": row.mixer,
        "name": row.mixer,
        "model": row.task,
        "full": False,
        "x": cost,
        "x_low": cost,
        "x_high": cost,
        "y": quality.value,
        "y_low": quality.low,
        "y_high": quality.high,
        "cost": f"{cost:,.0f}",
        "quality": row.texts()[0],
        "change": "–",
    }


def _unbeaten(points: Sequence[Mapping[str, Any]], *, cheaper: bool, higher: bool) -> set[str]:
    """The names of the points that no other beats on both axes."""

    def loss(point: Mapping[str, Any]) -> tuple[float, float]:
        return (point["x"] if cheaper else -point["x"], -point["y"] if higher else point["y"])

    losses = {point["name"]: loss(point) for point in points}
    return {
        name
        for name, (x, y) in losses.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in losses.values())
    }
