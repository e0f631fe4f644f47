"""The page of a search: one HTML file that opens offline. Here is what it shows; how it looks is in page.html.j2."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from foveate.compare.charts import frontier_chart, looks, walk_chart
from foveate.compare.report import HERE as COMPARE
from foveate.compare.report import page_script, write_page
from foveate.search.axes import AXES

if TYPE_CHECKING:
    from foveate.search import SearchResult

HERE = Path(__file__).parent


def write_report(result: SearchResult, out: Path) -> Path:
    """Write the page of a search, in one piece or not at all, and return where it is.

    Raises:
        FoveateError: the file can't be written.
    """
    return write_page(render(result), out)


def render(result: SearchResult) -> str:
    """The page as text."""
    goal = result.goal
    axis_look = looks({axis: False for axis in AXES if any(step.axis == axis for step in result.steps)})
    rows = [row for row in result.judged if row.recipe in ("full", "search")] + result.singles
    look = looks({row.recipe: row.recipe == "full" for row in rows})
    charts = []
    if result.steps:
        charts.append(_walked(result, axis_look))
    if sum(row.stream is not None for row in rows) > 1:
        charts.append(_verdict(result, rows, look))
    script = page_script()
    template = Environment(loader=FileSystemLoader([HERE, COMPARE]), autoescape=True).get_template(
        "page_search.html.j2"
    )
    return template.render(
        result=result,
        goal=goal,
        axis_look=axis_look,
        axis_words={name: axis.words for name, axis in AXES.items()},
        look={**look, **axis_look},
        charts=[{**chart, "index": index} for index, chart in enumerate(charts)],
        rows=[_row(result, row) for row in rows],
        steps=[
            {
                "name": step.name,
                "axis": step.axis,
                "amount": goal.words(step.amount),
                "loss": f"{step.loss:.4f}",
                "rise": f"{step.loss - before:+.4f}",
            }
            for step, before in zip(result.steps, [0.0, *(step.loss for step in result.steps)], strict=False)
        ],
        layers=_layers(result),
        specs=[chart["spec"] for chart in charts],
        # The browser runs this script and no other, even if a text slipped through unescaped.
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(COMPARE / "page.css").read_text(encoding="utf-8"),
    )


def _walked(result: SearchResult, look: Any) -> dict[str, Any]:
    goal = result.goal
    points = [
        {"recipe": step.axis, "step": step.name, "x": goal.drawn(step.amount), "y": step.loss} for step in result.steps
    ]
    title = "Loss on calibration text, step by step"
    words = {"title": title, "x": goal.drawn_as, "y": "nats a token from the original (lower is better)"}
    return {"kind": "walk", "title": title, "spec": walk_chart(points, look, **words, percent=goal.name == "params")}


def _verdict(result: SearchResult, rows: list[Any], look: Any) -> dict[str, Any]:
    goal, points = result.goal, []
    for row in rows:
        figure, ratio = row.perplexity, result.over(row)
        if figure is None or ratio is None:
            continue
        x = goal.drawn(row.amount)
        points.append(
            {
                "recipe": row.recipe,
                "name": row.recipe,
                "model": result.model,
                "full": row.recipe == "full",
                "best": row.recipe in ("full", "search"),
                **{"x": x, "x_low": x, "x_high": x},
                **{"y": figure.value, "y_low": figure.low, "y_high": figure.high},
                "cost": goal.words(row.amount),
                "quality": f"{figure.value:.4g} [{figure.low:.3g}, {figure.high:.3g}]",
                "change": f"{ratio.value:.3f} times the search's",
            }
        )
    title = "Perplexity on evaluation text"
    words = {"title": title, "x": goal.drawn_as, "y": "perplexity"}
    spec = frontier_chart(points, look, **words, percent=(goal.name == "params", False))
    return {"kind": "verdict", "title": title, "spec": spec}


def _row(result: SearchResult, row: Any) -> dict[str, Any]:
    figure, ratio = row.perplexity, result.over(row)
    entry: dict[str, Any] = {
        "recipe": row.recipe,
        "amount": result.goal.words(row.amount),
        "drawn": result.goal.drawn(row.amount),
        "note": row.note,
    }
    if figure is not None and ratio is not None:
        entry |= {
            "value": figure.value,
            "perplexity": f"{figure.value:.4g}",
            "interval": f"[{figure.low:.4g}, {figure.high:.4g}]",
            "ratio": ratio.value,
            "over": "" if row.recipe == "search" else f"{ratio.value:.3f}",
            "ratio_interval": "" if row.recipe == "search" else f"[{ratio.low:.3f}, {ratio.high:.3f}]",
        }
    return entry


def _layers(result: SearchResult) -> list[dict[str, Any]]:
    """For each layer what stays of its attention and of its MLP, as fractions, with words."""
    plan = result.plan

    def stays(layer: int, whole: str, part: str) -> dict[str, Any]:
        for kind in (whole, part):
            if kind in plan.keep and plan.counts[kind][layer] > len(plan.keep[kind][layer]):
                kept, count = len(plan.keep[kind][layer]), plan.counts[kind][layer]
                words = "gone" if kind == whole or not kept else f"{kept} of {count}"
                return {"share": 0.0 if words == "gone" else kept / count, "words": words}
        if (layer, whole) in result.ranks:
            return {"share": result.ranks[layer, whole], "words": f"{result.ranks[layer, whole]:.0%} in factors"}
        return {"share": 1.0, "words": "all"}

    return [
        {"index": i, "attention": stays(i, "attention", "kv_head"), "mlp": stays(i, "mlp", "channel")}
        for i in range(result.layers if plan.keep or result.ranks else 0)
    ]
