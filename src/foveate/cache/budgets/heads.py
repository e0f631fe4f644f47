"""Budgets by a score of the KV heads: the best keep everything, the rest sinks and what is recent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.cache.budgets.base import EVERYTHING, Budget
from foveate.errors import FoveateError
from foveate.methods import Target, UnitScores


@dataclass(frozen=True, kw_only=True)
class HeadsBudget(Budget):
    """The KV heads with the highest scores keep all entries; the others share what is left of the budget evenly.

    A technique overrides `scores`.

    Fields:
        whole: the fraction of KV heads that keep everything. None: half of `keep` (a tenth, where the policy counts
            entries), so that half of the budget is theirs.
    """

    whole: float | None = None

    def scores(self, target: Target) -> UnitScores:
        """Of kind "kv_head": (layers, kv_heads), higher = needs the far past more."""
        raise NotImplementedError

    def check(self, who: str, keep: float | None) -> None:
        if self.whole is None:
            return
        if not 0 < self.whole <= 1:
            raise FoveateError(f"{self.name}: whole={self.whole} is outside (0, 1]: it is a fraction of the KV heads.")
        if keep is not None and self.whole >= keep and keep < 1:
            raise FoveateError(
                f"{who}: {self.name} is to keep everything in {self.whole:g} of the KV heads, which leaves nothing of "
                f"keep={keep:g} for the others: give whole below {keep:g}."
            )

    def weights(self, target: Target, keep: float | None) -> Tensor:
        whole = self.whole if self.whole is not None else 0.1 if keep is None else keep / 2
        scores = self.scores(target)
        best = scores.keep(whole)
        return torch.ones(scores.scores.shape).masked_fill(best.cpu(), EVERYTHING)
