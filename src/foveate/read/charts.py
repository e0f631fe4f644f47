"""Pictures of a reading as plain SVG: they need no script, print, and follow the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from markupsafe import Markup

from foveate.methods import UnitScores
from foveate.probes.base import Grid, Lines

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 260, 46, 34, 10
"""Of a chart of lines, in units of its picture."""
COLOURS = 12
"""Classes c0 to c11 of the style sheet."""


def lines_svg(panel: Lines) -> Markup:
    """Curves, or single points where a series has only one.

    Example:
        >>> "polyline" in lines_svg(Lines("rise", "layer", "share", {"a": [(0, 0.1), (1, 0.4)]}))
        True
    """
    panel = replace(panel, series={name: [p for p in s if _there(*p)] for name, s in panel.series.items()})
    points = [p for series in panel.series.values() for p in series]
    if not points:
        return Markup("")
    xs, ys = ticks([p[0] for p in points], 7, whole=True), ticks([p[1] for p in points], 5)
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_low, y_high = min(ys[0], *(p[1] for p in points)), max(ys[-1], *(p[1] for p in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return round(LEFT + across * (WIDTH - LEFT - 12), 1), round(HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP), 1)

    parts = []
    for y in ys:
        at = place(x_low, y)[1]
        parts.append(f"<line class='rule' x1='{LEFT}' x2='{WIDTH - 12}' y1='{at}' y2='{at}'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{at + 4}' text-anchor='end'>{short(y)}</text>")
    for x in xs:
        at = place(x, y_low)[0]
        parts.append(f"<text x='{at}' y='{HEIGHT - BOTTOM + 16}' text-anchor='middle'>{short(x)}</text>")
    parts.append(f"<text x='{WIDTH - 12}' y='{HEIGHT - 3}' text-anchor='end'>{escape(panel.x)}</text>")
    for turn, (name, series) in enumerate(panel.series.items()):
        drawn = " ".join(f"{a},{b}" for a, b in (place(x, y) for x, y in series))
        dash = "" if turn < COLOURS else " stroke-dasharray='4 3'"
        if len(series) > 1:
            parts.append(f"<polyline class='c{turn % COLOURS}' points='{drawn}'{dash}/>")
        for x, y in series if len(series) <= 64 else ():
            a, b = place(x, y)
            told = f"{escape(name)}: {short(y)} at {escape(panel.x)} {short(x)}"
            parts.append(f"<circle class='c{turn % COLOURS}' cx='{a}' cy='{b}' r='2.4'><title>{told}</title></circle>")
    label = escape(
        f"{panel.title}: {panel.y} against {panel.x}, {short(x_low)} to {short(x_high)}; "
        + "; ".join(f"{name} from {short(s[0][1])} to {short(s[-1][1])}" for name, s in panel.series.items() if s)
    )
    return Markup(
        f"<svg class='lines' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{label}'>{''.join(parts)}</svg>"
    )


def grid_svg(panel: Grid) -> Markup:
    """A picture of numbers, darker where they are higher.

    Example:
        >>> grid_svg(Grid("likeness", "layer", "layer", [[1.0, None], [0.5, 1.0]])).count("<rect")
        3
    """
    numbers = [v for row in panel.values for v in row if v is not None and math.isfinite(v)]
    if not numbers:
        return Markup("")
    low, high = min(numbers), max(numbers)
    rows, columns = len(panel.values), max(map(len, panel.values))
    size = max(6, min(18, 460 // max(rows, columns)))
    cells = [
        f"<rect x='{LEFT + size * j}' y='{size * i}' width='{size - 0.6}' height='{size - 0.6}' "
        f"fill-opacity='{0.05 + 0.95 * (v - low) / ((high - low) or 1):.2f}'>"
        f"<title>{escape(panel.y)} {i}, {escape(panel.x)} {j}: {short(v)}</title></rect>"
        for i, row in enumerate(panel.values)
        for j, v in enumerate(row)
        if v is not None and math.isfinite(v)
    ]
    width, height = LEFT + size * columns + 4, size * rows + BOTTOM
    step = max(1, math.ceil(max(rows, columns) / 8))
    marks = [
        f"<text x='{LEFT - 6}' y='{size * i + size - 2}' text-anchor='end'>{i}</text>" for i in range(0, rows, step)
    ]
    marks += [f"<text x='{LEFT + size * j}' y='{size * rows + 14}'>{j}</text>" for j in range(0, columns, step)]
    marks.append(f"<text x='{width}' y='{height - 3}' text-anchor='end'>{escape(panel.x)}</text>")
    label = escape(
        f"{panel.title}: {panel.y} from top to bottom, {panel.x} from left to right, {short(low)} to {short(high)}"
    )
    return Markup(
        f"<svg class='grid' viewBox='0 0 {width} {height}' style='max-width:{width}px' role='img' aria-label='{label}'>"
        f"{''.join(cells)}{''.join(marks)}</svg>"
    )


def _there(*values: float | None) -> bool:
    return all(v is not None and math.isfinite(v) for v in values)


def scores_panel(name: str, scores: UnitScores) -> Lines | Grid:
    """Scores as a picture: a curve over layers where a layer has one unit, else layers x units."""
    rows = [[None if v != v else v for v in row] for row in scores.scores.double().tolist()]
    if scores.scores.shape[1] == 1:
        return Lines(name, "layer", name, {name: [(i, row[0]) for i, row in enumerate(rows) if row[0] is not None]})
    return Grid(name, scores.kind.replace("_", " "), "layer", rows)


def ticks(values: Sequence[float], most: int, whole: bool = False) -> list[float]:
    """Round numbers within the range of some values, at most `most + 1` of them.

    Example:
        >>> ticks([0.03, 0.97], 5)
        [0.2, 0.4, 0.6, 0.8]
        >>> ticks([0, 29], 7, whole=True)
        [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]
    """
    low, high = min(values), max(values)
    if high <= low:
        return [float(low)]
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if whole and all(float(v).is_integer() for v in values):
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [round(float(i * step), 12) for i in range(first, math.floor(high / step + 1e-9) + 1)] or [float(low)]


def short(value: float | None) -> str:
    """A number for people: three significant digits, no needless zeros.

    Example:
        >>> short(0.12345), short(30.0), short(1234567.0), short(None)
        ('0.123', '30', '1.23e+06', '–')
    """
    if value is None or value != value:
        return "–"
    if float(value).is_integer() and abs(value) < 1e5:
        return f"{value:.0f}"
    return f"{value:.3g}"
