"""How alike two rankings are."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.measure.bootstrap import RESAMPLES, Metric


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's correlation, equal values sharing their ranks; None where one of them does not vary.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([0.1, 0.2, 0.2, 0.9]))
        1.0
    """

    def ranks(x: Tensor) -> Tensor:
        return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double()

    if len(a) < 3 or a.unique().numel() < 2 or b.unique().numel() < 2:
        return None
    return round(float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]), 6)


def correlation(a: Tensor, b: Tensor) -> Metric:
    """Spearman's correlation of pairs, (n,) each, with a 95% interval that resamples the pairs; 0 where none can be.

    Example:
        >>> correlation(torch.arange(9.0), torch.arange(9.0) ** 3).value
        1.0
    """
    draws = torch.randint(len(a), (RESAMPLES, len(a)), generator=torch.Generator().manual_seed(0))
    found = torch.tensor([rank_correlation(a[draw], b[draw]) or 0.0 for draw in draws], dtype=torch.float64)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Metric(rank_correlation(a, b) or 0.0, low, high)
