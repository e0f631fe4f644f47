"""The page's charts, as Vega-Lite specifications made with Altair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

# At least 3:1 against the light and the dark page alike, and as far apart as six such colours can be in the
# three common kinds of colour blindness.
COLOURS = ("#0c80f5", "#cb8600", "#00855a", "#964ca9", "#b4360c", "#e70052")
NEUTRAL = "#7b8591"  # for `full`, which the others are held against
# SVG paths in a box from -1 to 1, for the charts and the table alike: colour never speaks alone. They are one
# fewer than the colours, so that looks come again late.
DISC = "M0,-1A1,1,0,1,1,0,1A1,1,0,1,1,0,-1Z"
SHAPES = (
    "M-.9,-.9H.9V.9H-.9Z",
    "M0,-1L1,.8H-1Z",
    "M0,-1.2L1.1,0L0,1.2L-1.1,0Z",
    "M-.4,-1H.4V-.4H1V.4H.4V1H-.4V.4H-1V-.4H-.4Z",
    "M0,1L1,-.8H-1Z",
)

HIGHEST = 1e6  # times the lowest value: where a chart ends at the latest, as a broken recipe may reach 1e304

Look = Mapping[str, tuple[str, str]]
"""The colour and the shape of each recipe, the same on the whole page."""


def looks(recipes: Mapping[str, bool]) -> Look:
    """A look for each recipe (mapped to whether it is a `full`); 30 recipes before a look comes again.

    Example:
        >>> looks({"full": True, "window": False})["full"][0] == NEUTRAL
        True
    """
    others = [recipe for recipe, is_full in recipes.items() if not is_full]
    ranks = {recipe: (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, recipe in enumerate(others)}
    return {recipe: ranks.get(recipe, (NEUTRAL, DISC)) for recipe in recipes}


def frontier_chart(
    points: Sequence[Mapping[str, Any]], look: Look, *, title: str, x: str, y: str, percent: tuple[bool, bool]
) -> dict[str, Any]:
    """Quality against cost: error bars, a line through the recipes that no other beats, names where they fit.

    Args:
        points: each has `recipe`, `name`, `model`, `x`, `x_low`, `x_high`, `y`, `y_low`, `y_high`, `best` (is
            it on the line) and `full`, and the texts `cost`, `quality` and `change` for the tooltip.
        look: of every recipe.
        title: said to screen readers.
        x, y: the axes' titles.
        percent: whether (x, y) are fractions, to be shown in percent.

    Example:
        >>> point = {"recipe": "full", "name": "full", "model": "tiny", "best": True, "full": True,
        ...          "x": 1, "x_low": 1, "x_high": 1, "y": 12, "y_low": 11, "y_high": 13,
        ...          "quality": "12", "change": "", "cost": "100%"}
        >>> spec = frontier_chart([point], looks({"full": True}), title="Perplexity against cache",
        ...                       x="cache", y="perplexity", percent=(True, False))
        >>> len(spec["layer"])
        5
    """
    # A recipe that breaks would squeeze the others into one line. Where most lie within twice the lowest
    # value the axis ends there; what is above sits on the edge, with its value in its name.
    lowest = min(point["y"] for point in points)
    broken = [point for point in points if point["y"] > 2 * lowest]
    edge = (2 if len(broken) < len(points) / 2 else HIGHEST) * lowest
    if not percent[1]:
        points = [_on_edge(point, edge) if point["y"] > edge else point for point in points]

    better = "higher" if percent[1] else "lower"
    heights = [0, 1] if percent[1] else [point[end] for point in points for end in ("y_low", "y_high")]
    y_axis = alt.Y("y:Q", **_axis(heights, f"{y} ({better} is better)", percent[1]))
    widths = [point[end] for point in points for end in ("x_low", "x_high")]
    x_axis = alt.X("x:Q", **_axis(widths, x, percent[0]))
    said = [
        alt.Tooltip("recipe:N"),
        alt.Tooltip("quality:N", title=y),
        alt.Tooltip("change:N", title="against full"),
        alt.Tooltip("cost:N", title=x),
    ]
    points = [{**p, "said": f"{p['recipe']}: {y} {p['quality']}, {x} {p['cost']}"} for p in points]
    marks = _chart(points).encode(
        x=x_axis, y=y_axis, color=_colour(look), shape=_shape(look), tooltip=said, description="said:N"
    )
    line = _chart([point for point in points if point["best"]]).encode(x=x_axis, y=y_axis, detail="model:N")
    layers = [line.mark_line(color=NEUTRAL, opacity=0.5, aria=False)]
    if full := [point for point in points if point["full"]]:
        dotted = _chart(full).encode(y=y_axis)
        layers.append(dotted.mark_rule(strokeDash=[2, 4], color=NEUTRAL, aria=False))
    if upright := [point for point in points if point["y_low"] < point["y_high"]]:
        bars = _chart(upright).encode(x=x_axis, y="y_low:Q", y2="y_high:Q", color=_colour(look))
        layers.append(bars.mark_rule(strokeWidth=1.5, aria=False))
    if across := [point for point in points if point["x_low"] < point["x_high"]]:
        bars = _chart(across).encode(x="x_low:Q", x2="x_high:Q", y=y_axis, color=_colour(look))
        layers.append(bars.mark_rule(strokeWidth=1.5, aria=False))
    layers += [marks.mark_point(filled=True, size=110, opacity=1), _names(points, x_axis, y_axis)]
    return _finish(layers, title)


def _on_edge(point: Mapping[str, Any], edge: float) -> dict[str, Any]:
    name = f"{point['name']} ↑ {point['quality'].partition(' ')[0]}"
    return {**point, "y": edge, "y_low": edge, "y_high": edge, "name": name}


def curve_chart(points: Sequence[Mapping[str, Any]], look: Look, *, title: str, x: str, y: str) -> dict[str, Any]:
    """A line a recipe along the text; where one of them breaks, the y axis is logarithmic and the line named.

    Args:
        points: each has `recipe`, `name`, `x` and `y`, in the order of the text.
        look, title, x, y: as for `frontier_chart`.

    Example:
        >>> points = [{"recipe": "full", "name": "full", "x": 128 * i, "y": 6.0 * i} for i in range(1, 9)]
        >>> spec = curve_chart(points, looks({"full": True}), title="along", x="tokens", y="perplexity")
        >>> spec["layer"][0]["encoding"]["y"]["scale"]["type"]
        'log'
    """
    said = [
        alt.Tooltip("recipe:N"),
        alt.Tooltip("x:Q", title=x, format=","),
        alt.Tooltip("y:Q", title=y, format=",.4r"),
    ]
    x_axis = alt.X("x:Q", title=x, axis=alt.Axis(format="~s", tickCount=6), scale=alt.Scale(nice=False))
    edge = HIGHEST * min(point["y"] for point in points)
    points = [{**point, "height": min(point["y"], edge)} for point in points]
    y_axis = alt.Y("height:Q", **_axis([point["height"] for point in points], y))
    lines = _chart(points).encode(x=x_axis, y=y_axis, color=_colour(look))
    ends = {point["recipe"]: point for point in points}.values()
    apart = [a for a in ends if all(a is b or a["y"] > 2 * b["y"] or b["y"] > 2 * a["y"] for b in ends)]
    layers = [
        lines.mark_line(strokeWidth=2, aria=False),
        lines.encode(shape=_shape(look), tooltip=said).mark_point(filled=True, size=26, opacity=1),
    ]
    if apart:
        layers.append(_names(apart, x_axis, y_axis))
    return _finish(layers, title)


def walk_chart(points: Sequence[Mapping[str, Any]], look: Look, *, title: str, x: str, y: str, percent: bool) -> Any:
    """One line from step to step, each marked by its sort.

    Args:
        points: each has `recipe` (the sort of step), `step` (its name), `x` and `y`, in the order of the steps.
        look, title, x, y: as for `frontier_chart`.
        percent: whether x is a fraction, to be shown in percent.

    Example:
        >>> points = [{"recipe": "mlp", "step": f"mlp {i}", "order": i, "x": 1 - 0.1 * i, "y": i} for i in range(3)]
        >>> spec = walk_chart(points, looks({"mlp": False}), title="walked", x="parameters", y="loss", percent=True)
        >>> len(spec["layer"])
        2
    """
    points = [{**point, "order": order} for order, point in enumerate(points)]
    said = [
        alt.Tooltip("step:N"),
        alt.Tooltip("x:Q", title=x, format=".1%" if percent else ",.4r"),
        alt.Tooltip("y:Q", title=y, format=",.3r"),
    ]
    x_axis = alt.X("x:Q", **_axis([point["x"] for point in points], x, percent))
    y_axis = alt.Y("y:Q", **_axis([point["y"] for point in points], y))
    every = _chart(points).encode(x=x_axis, y=y_axis)
    line = every.encode(order="order:Q").mark_line(color=NEUTRAL, opacity=0.6, aria=False)
    marks = every.encode(color=_colour(look), shape=_shape(look), tooltip=said)
    return _finish([line, marks.mark_point(filled=True, size=50, opacity=1)], title)


def _chart(points: Sequence[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=list(points)))


def _axis(values: Sequence[float], title: str, percent: bool = False) -> dict[str, Any]:
    """Title, ticks and scale of an axis: logarithmic where the values span more than a factor of 6."""
    low, high = min(values), max(values)
    form = "~%" if percent else ",~r" if high < 1e6 else "~g"
    if low <= 0 or high <= 6 * low:
        axis = alt.Axis(format=form, tickCount=5)
        scale = alt.Scale(domainMin=low, domainMax=high, nice=not percent, zero=False, padding=18)
    else:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if len(tens) < 5 else (1,)
        ticks = [digit * 10.0**ten for ten in tens[:: math.ceil(len(tens) / 8)] for digit in digits]
        axis = alt.Axis(format=form, values=[tick for tick in ticks if low / 1.5 < tick < high * 1.5])
        scale = alt.Scale(type="log", nice=False, padding=18)
    return {"title": title, "axis": axis, "scale": scale}


def _colour(look: Look) -> alt.Color:
    scale = alt.Scale(domain=list(look), range=[colour for colour, _ in look.values()])
    return alt.Color("recipe:N", scale=scale, legend=None)


def _shape(look: Look) -> alt.Shape:
    scale = alt.Scale(domain=list(look), range=[shape for _, shape in look.values()])
    return alt.Shape("recipe:N", scale=scale, legend=None)


def _names(points: Sequence[Mapping[str, Any]], x: alt.X, y: alt.Y) -> alt.Chart:
    """Names beside the points; the page's script moves them apart and drops those that find no room."""
    return _chart(points).encode(x=x, y=y, text="name:N").mark_text(limit=240, fontSize=11, aria=False)


def _finish(layers: Sequence[alt.Chart], title: str) -> dict[str, Any]:
    chart: Any = alt.layer(*layers)
    chart = chart.properties(width="container", height=300, description=title, background="white")
    chart = chart.configure(font="system-ui, sans-serif", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    chart = chart.configure_view(stroke=None).configure_axis(
        domain=False,
        ticks=False,
        labelPadding=8,
        labelFontSize=12,
        titlePadding=12,
        titleFontSize=12,
        titleFontWeight="normal",
        titleAnchor="start",
    )
    chart = chart.configure_axisY(titleAngle=0, titleAlign="left", titleAnchor="end", titleX=0, titleY=-14)
    return chart.to_dict()
