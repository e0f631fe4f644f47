from __future__ import annotations

import math

import numpy as np
import pytest

from foveate.measure.bootstrap import Metric, mean, median, perplexity, perplexity_ratio


def test_an_exact_figure_has_no_width():
    assert Metric.exact(3).to_json() == {"value": 3.0, "low": 3.0, "high": 3.0}


@pytest.mark.parametrize("figure", [mean, median])
def test_intervals_hold_the_figure_and_repeat(figure):
    values = np.random.default_rng(0).normal(5, 1, 40).tolist()
    metric = figure(values)
    assert metric.low < metric.value < metric.high
    assert figure(values) == metric and figure(values, seed=1) != metric
    assert figure([2.0] * 5) == Metric.exact(2) == figure([2.0])


@pytest.mark.parametrize("figure", [mean, median])
def test_intervals_cover_the_truth_about_95_times_of_100(figure):
    rng = np.random.default_rng(1)
    metrics = [figure(rng.normal(0, 1, 40)) for _ in range(300)]
    assert 0.9 < np.mean([m.low <= 0 <= m.high for m in metrics]) < 0.985


def test_more_cases_narrow_the_interval():
    values = np.random.default_rng(0).normal(5, 1, 400)
    few, many = mean(values[:25]), mean(values)
    assert (many.high - many.low) < (few.high - few.low) / 2.5


def test_perplexity_weighs_blocks_by_their_tokens():
    metric = perplexity([10.0, 60.0], [10, 20])
    assert metric.value == pytest.approx(math.exp(70 / 30))
    assert metric.low == pytest.approx(math.exp(1)) and metric.high == pytest.approx(math.exp(3))


def test_a_broken_model_still_has_a_finite_perplexity():
    assert math.isfinite(perplexity([1e6, 1e6], [10, 10]).high)


def test_pairing_finds_what_two_intervals_hide():
    rng = np.random.default_rng(2)
    base = rng.normal(250, 40, 30)  # blocks differ much, the recipe costs each about 2%
    ours = base + rng.normal(2, 0.5, 30)
    counts = [100] * 30
    apart, full = perplexity(ours, counts), perplexity(base, counts)
    assert apart.low < full.high
    ratio = perplexity_ratio(ours, base, counts)
    assert 1 < ratio.low < ratio.value < ratio.high < 1.03
    assert ratio.value == pytest.approx(apart.value / full.value)
