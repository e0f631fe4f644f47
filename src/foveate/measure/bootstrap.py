"""Bootstrap intervals: how sure a figure is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Metric:
    """A figure and the ends of its 95% interval (all three equal where there is nothing to resample)."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Metric:
        """A figure that was counted, not estimated."""
        return cls(float(value), float(value), float(value))

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def _resampled(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, n))


def mean(values: Sequence[float], *, seed: int = 0) -> Metric:
    """The mean of independent cases, with a 95% percentile bootstrap interval.

    Example:
        >>> mean([1.0, 0.0, 1.0, 1.0]).value
        0.75
    """
    x = np.asarray(values, dtype=float)
    ends = np.percentile(x[_resampled(len(x), seed)].mean(axis=1), [2.5, 97.5])
    return Metric(float(x.mean()), float(ends[0]), float(ends[1]))


def median(values: Sequence[float], *, seed: int = 0) -> Metric:
    """The median of repeated timings, with a 95% percentile bootstrap interval.

    Example:
        >>> median([3.0, 1.0, 2.0]).value
        2.0
    """
    x = np.asarray(values, dtype=float)
    ends = np.percentile(np.median(x[_resampled(len(x), seed)], axis=1), [2.5, 97.5])
    return Metric(float(np.median(x)), float(ends[0]), float(ends[1]))


def perplexity(nll: Sequence[float], counts: Sequence[int], *, seed: int = 0) -> Metric:
    """exp(mean negative log-likelihood a token) with its interval, resampling blocks of neighbouring tokens.

    Neighbouring tokens' losses are correlated, so whole blocks are drawn, not tokens.

    Args:
        nll: summed negative log-likelihood (nats) of each block.
        counts: tokens in each block.

    Example:
        >>> round(perplexity([6.9, 6.9], [10, 10]).value, 2)
        1.99
    """
    x, n = np.asarray(nll, dtype=float), np.asarray(counts, dtype=float)
    draws = _resampled(len(x), seed)
    ends = np.percentile(x[draws].sum(axis=1) / n[draws].sum(axis=1), [2.5, 97.5])
    low, value, high = np.exp(np.minimum([ends[0], x.sum() / n.sum(), ends[1]], 700))  # exp(700) is still finite
    return Metric(float(value), float(low), float(high))


def perplexity_ratio(
    nll: Sequence[float], baseline: Sequence[float], counts: Sequence[int], *, seed: int = 0
) -> Metric:
    """Perplexity over the baseline's on the same blocks, resampled together: far narrower than two intervals.

    Example:
        >>> perplexity_ratio([7.0, 9.0], [7.0, 9.0], [10, 10]).high
        1.0
    """
    return perplexity(np.asarray(nll, dtype=float) - np.asarray(baseline, dtype=float), counts, seed=seed)
