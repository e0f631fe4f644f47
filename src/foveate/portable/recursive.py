"""A linear map whose weight several depths share, each with a small correction of its own.

This file travels with saved models: torch is all it needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LoopedLinear(nn.Module):
    """A shared linear map plus this depth's own low-rank correction (LoRA) and bias.

    One depth owns the shared map, as `base`; the others refer to their owner, so that it is saved once. They ask the
    owner for its `base` at every forward: whatever takes its place there (a quantised map, say) is in force for all.

    Args:
        in_features, out_features: widths.
        rank: of the correction; 0: there is none.
        bias: whether the map has a bias.
        owner: the path, in the model, of the module that owns the shared map; None: this one does.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, owner: str | None = None):
        super().__init__()
        self.in_features, self.out_features, self.rank, self.owner = in_features, out_features, rank, owner
        if owner is None:
            self.base = nn.Linear(in_features, out_features, bias=False)
        if rank:
            self.down = nn.Linear(in_features, rank, bias=False)
            self.up = nn.Linear(rank, out_features, bias=False)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._owner: tuple[Any, ...] = (self,) if owner is None else ()

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank}
        return {**sizes, "bias": self.bias is not None, "owner": self.owner}

    def tie(self, model: nn.Module) -> None:
        if self.owner is not None:
            self._owner = (model.get_submodule(self.owner),)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._owner[0].base(x)
        if self.rank:
            out = out + self.up(self.down(x))
        return out if self.bias is None else out + self.bias
