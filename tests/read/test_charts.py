"""Charts of a reading: what is drawn is what was measured, and no text gets out of its place."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
import torch

from foveate.methods import UnitScores
from foveate.probes.base import Grid, Lines
from foveate.read.charts import grid_svg, lines_svg, scores_panel, short, ticks

HOSTILE = "</svg><script>alert(1)</script>'\"&"


def parsed(svg):
    return ElementTree.fromstring(re.sub(r"<svg ", "<svg ", str(svg)))


def test_a_line_goes_up_where_the_numbers_do():
    svg = parsed(lines_svg(Lines("t", "layer", "share", {"a": [(0, 0.0), (1, 0.5), (2, 1.0)]})))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] > points[1][1] > points[2][1]
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.1)


def test_hostile_names_are_escaped():
    for svg in (
        lines_svg(Lines(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: [(0, 1.0), (1, 2.0)]})),
        grid_svg(Grid(HOSTILE, HOSTILE, HOSTILE, [[1.0, 2.0]])),
    ):
        assert "<script" not in svg
        parsed(svg)


def test_empty_and_flat_are_no_accident():
    assert lines_svg(Lines("t", "x", "y", {})) == "" and lines_svg(Lines("t", "x", "y", {"a": [(0, None)]})) == ""
    parsed(lines_svg(Lines("t", "x", "y", {"a": [(3, 2.0)]})))
    parsed(grid_svg(Grid("t", "x", "y", [[1.0, 1.0], [None, 1.0]])))
    assert grid_svg(Grid("t", "x", "y", [[None]])) == ""


def test_a_grid_is_darkest_at_its_highest():
    cells = parsed(grid_svg(Grid("t", "x", "y", [[0.0, 0.5], [1.0, None]]))).findall("rect")
    shades = [float(cell.get("fill-opacity")) for cell in cells]
    assert shades == sorted(shades) and len(shades) == 3 and shades[-1] == 1


def test_scores_of_layers_are_a_line_and_of_heads_a_grid():
    line = scores_panel("change", UnitScores("layer", torch.tensor([[0.1], [math.nan], [0.3]])))
    assert isinstance(line, Lines) and [x for x, _ in line.series["change"]] == [0, 2]
    grid = scores_panel("sink", UnitScores("head", torch.tensor([[0.1, math.nan]])))
    assert isinstance(grid, Grid) and grid.values[0][1] is None


@pytest.mark.parametrize("values", [[0, 29], [0.0001, 0.0009], [-3, 12345], [5, 5], [1e-9, 1e9]])
def test_ticks_are_within_and_few(values):
    marks = ticks(values, 6)
    assert 1 <= len(marks) <= 8 and min(values) <= marks[0] + 1e-8 and marks[-1] <= max(values) + 1e-8


def test_numbers_are_short():
    assert [short(x) for x in (0, 12, 0.5, float("nan"), 1234.5)] == ["0", "12", "0.5", "–", "1.23e+03"]
