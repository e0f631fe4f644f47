"""A linear map as two thin ones.

This file travels with saved models: torch is all it needs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """A linear map of low rank: first down to `rank` numbers, then up to the output.

    Both are plain linear maps, so that what works on linear maps (LoRA, quantisation) works on them.

    Args:
        in_features, out_features: the widths of the map that it stands for.
        rank: the width between.
        bias: whether the map has a bias.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.has_bias = bias
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank}
        return {**sizes, "bias": self.has_bias}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out
