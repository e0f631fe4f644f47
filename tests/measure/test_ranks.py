"""Rank correlation: worked by hand, with ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.measure.ranks import correlation, rank_correlation

X, Y = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]), torch.tensor([2.0, 7.0, 1.0, 8.0, 2.0])
RANKS = np.array([3, 1.5, 4, 1.5, 5]), np.array([2.5, 4, 1, 5, 2.5])


def test_equal_values_share_their_ranks():
    assert rank_correlation(X, Y) == pytest.approx(np.corrcoef(*RANKS)[0, 1], abs=1e-6)


def test_what_does_not_vary_has_none():
    assert rank_correlation(X, torch.ones(5)) is None and rank_correlation(X[:2], Y[:2]) is None
    assert correlation(X, torch.ones(5)).value == 0


def test_the_interval_holds_the_figure():
    found = correlation(X, Y)
    assert found.value == pytest.approx(np.corrcoef(*RANKS)[0, 1], abs=1e-6)
    assert -1 <= found.low <= found.value <= found.high <= 1
