"""The page's charts, as Vega-Lite specifications made with Altair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

# Told apart with any colour vision, and at least 3:1 against both the light and the dark page.
COLOURS = ("#0d7bc4", "#d55e00", "#00916a", "#b565a0", "#a67c00", "#2f9fb5", "#d1495b")
NEUTRAL = "#7b8591"  # for `full`, which the others are held against
# SVG paths in a box from -1 to 1, for the charts and the table alike: colour never speaks alone.
DISC = "M0,-1A1,1,0,1,1,0,1A1,1,0,1,1,0,-1Z"
SHAPES = (
    "M-.9,-.9H.9V.9H-.9Z",
    "M0,-1L1,.8H-1Z",
    "M0,-1.2L1.1,0L0,1.2L-1.1,0Z",
    "M-.4,-1H.4V-.4H1V.4H.4V1H-.4V.4H-1V-.4H-.4Z",
    "M0,1L1,-.8H-1Z",
)

Look = Mapping[str, tuple[str, str]]
"""The colour and the shape of each recipe, the same on the whole page."""


def looks(recipes: Mapping[str, bool]) -> Look:
    """A look for each recipe (mapped to whether it is a `full`); 35 recipes before a look comes again.

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
        points: each has `recipe`, `name`, `model`, `x`, `y`, `x_low`, `x_high`, `y_low`, `y_high`, `best` (is it on
            the line) and `full`, and the texts `cost`, `quality` and `change` for the tooltip.
        look: of every recipe.
        title: said to screen readers.
        x, y: the axes' titles.
        percent: whether (x, y) are fractions, to be shown in percent.

    Example:
        >>> point = {"recipe": "full", "name": "full", "model": "tiny", "x": 1, "y": 12, "x_low": 1, "x_high": 1, "y_low": 11,
        ...          "y_high": 13, "best": True, "full": True, "quality": "12", "change": "", "cost": "100%"}
        >>> spec = frontier_chart([point], looks({"full": True}), title="Perplexity against cache",
        ...                       x="cache", y="perplexity", percent=(True, False))
        >>> len(spec["layer"])
        4
    """
    # A recipe that breaks would squeeze the others into one line. Where most lie within twice the lowest value
    # the axis ends there; what is above sits on the edge, with its value in its name.
    edge = 2 * min(point["y"] for point in points)
    above = [point for point in points if point["y"] > edge > 0]
    if not percent[1] and len(above) < len(points) / 2:
        points = [_on_edge(point, edge) if point in above else point for point in points]

    better = "higher" if percent[1] else "lower"
    heights = [point[end] for point in points for end in ("y_low", "y_high")] + [0, 1] * percent[1]
    y_axis = _axis(alt.Y, heights, f"{y} ({better} is better)", percent[1])
    x_axis = _axis(alt.X, [point["x"] for point in points], x, percent[0])
    said = [
        alt.Tooltip("recipe:N"), alt.Tooltip("quality:N", title=y), alt.Tooltip("change:N", title="against full"),
        alt.Tooltip("cost:N", title=x),
    ]
    marks = _chart(points).encode(x=x_axis, y=y_axis, color=_colour(look), shape=_shape(look), tooltip=said)
    layers = [marks.mark_point(filled=True, size=110, opacity=1)]
    for axis, other in (("x", y_axis), ("y", x_axis)):
        if barred := [point for point in points if point[f"{axis}_low"] < point[f"{axis}_high"]]:
            ends = {axis: f"{axis}_low:Q", f"{axis}2": f"{axis}_high:Q", "y" if axis == "x" else "x": other}
            bars = _chart(barred).encode(color=_colour(look), **ends)
            layers.insert(0, bars.mark_rule(strokeWidth=1.5, aria=False))
    if full := [point for point in points if point["full"]]:
        layers.insert(0, _chart(full).encode(y=y_axis).mark_rule(strokeDash=[2, 4], color=NEUTRAL, aria=False))
    line = _chart([point for point in points if point["best"]]).encode(x=x_axis, y=y_axis, detail="model:N")
    layers.insert(0, line.mark_line(color=NEUTRAL, opacity=0.5, aria=False))
    return _finish(alt.layer(*layers, _names(points, x_axis, y_axis)), title)


def _on_edge(point: Mapping[str, Any], edge: float) -> dict[str, Any]:
    name = f"{point['name']} ↑ {point['quality'].partition(' ')[0]}"
    return {**point, "y": edge, "y_low": edge, "y_high": edge, "name": name}


def curve_chart(points: Sequence[Mapping[str, Any]], look: Look, *, title: str, x: str, y: str) -> dict[str, Any]:
    """A line a recipe along the text; the y axis is logarithmic where one of them breaks.

    Args:
        points: each has `recipe`, `name`, `x` and `y`, in the order of the text.
        look, title, x, y: as for `frontier_chart`.

    Example:
        >>> points = [{"recipe": "full", "name": "full", "x": 128 * i, "y": 6.0 * i} for i in range(1, 9)]
        >>> spec = curve_chart(points, looks({"full": True}), title="along the text", x="tokens", y="perplexity")
        >>> spec["layer"][0]["encoding"]["y"]["scale"]["type"]
        'log'
    """
    said = [
        alt.Tooltip("recipe:N"), alt.Tooltip("x:Q", title=x, format=","), alt.Tooltip("y:Q", title=y, format=",.4r"),
    ]
    x_axis = alt.X("x:Q", title=x, axis=alt.Axis(format="~s", tickCount=6), scale=alt.Scale(nice=False))
    heights = [point["y"] for point in points]
    y_axis = _axis(alt.Y, heights, y)
    lines = _chart(points).encode(x=x_axis, y=y_axis, color=_colour(look))
    ends = {point["recipe"]: point for point in points}.values()
    near = (max(heights) / min(heights)) ** 0.08
    alone = [a for a in ends if all(a is b or max(a["y"] / b["y"], b["y"] / a["y"]) > near for b in ends)]
    return _finish(
        alt.layer(
            lines.mark_line(strokeWidth=2, aria=False),
            lines.encode(shape=_shape(look), tooltip=said).mark_point(filled=True, size=26, opacity=1),
            _names(alone, x_axis, y_axis),
        ),
        title,
    )


def _chart(points: Sequence[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=list(points)))


def _axis(kind: Any, values: Sequence[float], title: str, percent: bool = False) -> Any:
    """The x or y axis: logarithmic, with ticks at 1, 2 and 5, where the values span more than a factor of 6."""
    name, form = ("x:Q" if kind is alt.X else "y:Q"), ("~%" if percent else "~g")
    low, high = min(values), max(values)
    if low > 0 and high > 6 * low:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10**ten for ten in tens for digit in (1, 2, 5) if low / 1.5 < digit * 10**ten < high * 1.5]
        axis, scale = alt.Axis(format=form, values=ticks), alt.Scale(type="log", nice=False, padding=18)
    else:
        axis, scale = alt.Axis(format=form, tickCount=5), alt.Scale(zero=False, padding=18)
    return kind(name, title=title, axis=axis, scale=scale)


def _colour(look: Look) -> alt.Color:
    scale = alt.Scale(domain=list(look), range=[colour for colour, _ in look.values()])
    return alt.Color("recipe:N", scale=scale, legend=None)


def _shape(look: Look) -> alt.Shape:
    scale = alt.Scale(domain=list(look), range=[shape for _, shape in look.values()])
    return alt.Shape("recipe:N", scale=scale, legend=None)


def _names(points: Sequence[Mapping[str, Any]], x: alt.X, y: alt.Y) -> alt.Chart:
    """Names beside the points; the page's script moves them apart and drops those that find no room."""
    return _chart(points).encode(x=x, y=y, text="name:N").mark_text(limit=240, fontSize=11, aria=False)


def _finish(chart: alt.LayerChart, title: str) -> dict[str, Any]:
    chart = chart.properties(width="container", height=300, description=title, background="white")
    chart = chart.configure(font="system-ui, sans-serif", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    chart = chart.configure_view(stroke=None).configure_axis(
        grid=True, domain=False, ticks=False, labelPadding=8, titlePadding=12, labelFontSize=12, titleFontSize=12,
        titleFontWeight="normal", titleAnchor="start",
    )
    chart = chart.configure_axisY(titleAngle=0, titleAlign="left", titleAnchor="end", titleX=0, titleY=-14)
    return chart.to_dict()
