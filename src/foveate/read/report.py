"""The page of a reading: one HTML file that opens offline. Here is what it shows; how it looks is beside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from foveate.compare.report import write_page
from foveate.errors import FoveateError
from foveate.probes.base import PROBES, Grid, Lines, Marked, Reading, Role, Rows
from foveate.read.advice import advice
from foveate.read.charts import COLOURS, grid_svg, lines_svg, scores_panel, short

if TYPE_CHECKING:
    from foveate.read import Readings

HERE = Path(__file__).parent
COMPARE = HERE.parent / "compare"

CHAPTERS = {
    "Where attention rests": ("sinks", "domains", "spread"),
    "What heads do": ("induction", "retrieval-heads", "copying", "channels", "select-and-copy", "leak"),
    "At which depth things become readable": ("logit-lens", "concept-depth", "layers", "similar-attention"),
    "What causes an answer": (
        "causal-tracing",
        "knockout",
        "arithmetic",
        "factual-recall",
        "circuit-overlap",
        "context-knob",
    ),
    "Memory and context": ("verbatim", "in-context-graph"),
}
"""The page's chapters, and the probes that each tells of; whatever else was measured comes last."""

ROLE_WORDS = {
    "sink": "rests on the first token when there is nothing to fetch",
    "retrieval": "fetches words from far back when they are asked for",
    "induction": "continues what came before: after a token it looks at what followed that token earlier",
    "previous token": "looks at the token just before",
    "duplicate token": "looks at where the same token stood before",
    "copying": "says again what it looks at",
}
"""What the roles of the usual reading mean, for the legend."""


def write_anatomy(readings: Readings, out: Path) -> Path:
    """Write the page of a reading, in one piece or not at all, and return where it is.

    Raises:
        FoveateError: nothing was measured, or the file can't be written.
    """
    if not readings.readings:
        raise FoveateError("A page was asked for, but no probe was measured: name one that this model can be read by.")
    return write_page(render(readings), out)


def render(readings: Readings) -> str:
    """The page as text."""
    roles = _roles(readings)
    colour = {name: f"c{i % COLOURS}" for i, name in enumerate(roles)}
    script = (HERE / "read.js").read_text(encoding="utf-8")
    template = Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("page_read.html.j2")
    return template.render(
        readings=readings,
        summary=readings.summary(),
        roles=[
            {"name": name, "colour": colour[name], "count": len(heads), "words": ROLE_WORDS.get(name, "")}
            for name, heads in roles.items()
        ],
        rows=_map(readings, roles, colour),
        chapters=_chapters(readings),
        advice=advice(readings),
        short=short,
        data=_data(readings, colour),
        # The browser runs this script and no other, even if a text slipped through unescaped.
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(COMPARE / "page.css").read_text(encoding="utf-8") + (HERE / "read.css").read_text(encoding="utf-8"),
    )


def _head_roles(readings: Readings) -> Iterable[Role]:
    return (role for role in readings.roles if role.kind == "head")


def _roles(readings: Readings) -> dict[str, set[tuple[int, int]]]:
    """Roles of heads and who has them, the most frequent first."""
    found: dict[str, set[tuple[int, int]]] = {}
    for role in _head_roles(readings):
        found.setdefault(role.role, set()).add((role.layer, role.unit))
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _map(
    readings: Readings, roles: dict[str, set[tuple[int, int]]], colour: dict[str, str]
) -> list[list[dict[str, Any]]]:
    """A cell for each head: its colour is that of its rarest role, which tells most."""
    rarest = list(reversed(roles))
    rows = []
    for layer in range(readings.layers):
        row = []
        for head in range(readings.heads):
            own = [name for name in rarest if (layer, head) in roles[name]]
            said = ", ".join(own) or "no clear part"
            row.append(
                {
                    "name": f"{layer}.{head}",
                    "colour": colour[own[0]] if own else "",
                    "several": len(own) > 1,
                    "label": f"layer {layer}, head {head}: {said}",
                }
            )
        rows.append(row)
    return rows


def _chapters(readings: Readings) -> list[dict[str, Any]]:
    told = {name for names in CHAPTERS.values() for name in names}
    chapters = {**CHAPTERS, "More": tuple(name for name in readings if name not in told)}
    return [
        {
            "title": title,
            "probes": [_probe(name, readings.readings[name]) for name in names if name in readings.readings],
        }
        for title, names in chapters.items()
        if any(name in readings.readings for name in names)
    ]


def _probe(name: str, reading: Reading) -> dict[str, Any]:
    known = PROBES.all().get(name)
    panels = [_panel(panel) for panel in reading.panels]
    drawn = {panel.title for panel in reading.panels}
    # Scores of heads are on the map; those of layers and the like are drawn here, where no panel shows them.
    others = [
        _panel(scores_panel(score, of))
        for score, of in reading.scores.items()
        if of.kind not in ("head", "kv_head") and score not in drawn and not reading.panels
    ]
    return {
        "name": name,
        "reading": reading,
        "paper": known.paper if known is not None else None,
        "panels": [panel for panel in panels + others if panel is not None],
        "roles": sorted(reading.roles, key=lambda role: -role.score)[:40],
        "more": max(0, len(reading.roles) - 40),
    }


def _panel(panel: Any) -> dict[str, Any] | None:
    if isinstance(panel, Lines):
        drawn = lines_svg(panel)
        legend = [(name, f"c{i % COLOURS}") for i, name in enumerate(panel.series)]
        rows = [[name, short(x), short(y)] for name, series in panel.series.items() for x, y in series]
        table = Rows(panel.title, ["", panel.x, panel.y], rows)
        return {"kind": "lines", "panel": panel, "svg": drawn, "legend": legend, "table": table} if drawn else None
    if isinstance(panel, Grid):
        drawn = grid_svg(panel)
        columns = [f"{panel.y} / {panel.x}", *map(str, range(max(map(len, panel.values), default=0)))]
        table = Rows(panel.title, columns, [[str(i), *map(short, row)] for i, row in enumerate(panel.values)])
        return {"kind": "grid", "panel": panel, "svg": drawn, "table": table} if drawn else None
    if isinstance(panel, Rows):
        rows = [[_cell(cell) for cell in row] for row in panel.rows]
        return {"kind": "rows", "panel": panel, "table": Rows(panel.title, panel.columns, rows)}
    if isinstance(panel, Marked):
        top = max([*map(abs, panel.weights), 1e-9])
        shares = [max(0.0, weight) / top for weight in panel.weights]
        return {"kind": "marked", "panel": panel, "tokens": list(zip(panel.tokens, shares, panel.weights, strict=True))}
    return None


def _cell(cell: Any) -> Any:
    """What stands in a table: short numbers, and white space that can be seen."""
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return short(cell)
    if isinstance(cell, str) and cell and not cell.strip():
        return cell.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")
    return cell


def _data(readings: Readings, colour: dict[str, str]) -> dict[str, Any]:
    """What the page's script needs."""
    heads: dict[str, list[dict[str, Any]]] = {}
    for role in _head_roles(readings):
        heads.setdefault(f"{role.layer}.{role.unit}", []).append(
            {"role": role.role, "words": role.words, "colour": colour[role.role]}
        )
    group = max(1, readings.heads // readings.kv_heads)
    scores: dict[str, list[list[float | None]]] = {}
    for probe, reading in readings.readings.items():
        for name, of in reading.scores.items():
            if of.kind in ("head", "kv_head"):
                table = of.scores if of.kind == "head" else of.scores.repeat_interleave(group, 1)
                if tuple(table.shape) == (readings.layers, readings.heads):
                    rows = table.double().tolist()
                    scores[f"{probe}: {name}"] = [[None if v != v else float(f"{v:.4g}") for v in row] for row in rows]
    passage = readings.passage
    return {
        "layers": readings.layers,
        "heads": readings.heads,
        "roles": heads,
        "scores": scores,
        "tokens": passage.tokens if passage is not None else [],
        "attention": passage.heads if passage is not None else [],
    }
