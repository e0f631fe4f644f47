"""Pyramid: many entries in the first layers, few in the last."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.budgets.base import Budget, budget
from foveate.cache.budgets.trial import BeatsUniform
from foveate.claims import claim
from foveate.errors import FoveateError
from foveate.methods import Paper, Target
from foveate.models.anatomy import anatomy


@budget("pyramid")
class Pyramid(Budget):
    """Entries fall from layer to layer by equal steps, as attention gathers on fewer tokens (section 4.2).

    Fields:
        slope: how many times as many entries the first layer holds as the last.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "h2o:entries=8,budget=pyramid(slope=3)"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> [int(layer.held()[0, 0]) for layer in out.past_key_values.layers]
        [12, 9, 6, 4]
    """

    paper: ClassVar[Paper | None] = Paper(
        "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        2024,
        "https://arxiv.org/abs/2406.02069",
    )
    claim: ClassVar[str] = "first layers look at many tokens and last ones at few, so they need less"

    slope: float = 4.0

    def __post_init__(self) -> None:
        if not self.slope >= 1:
            raise FoveateError(f"pyramid: slope={self.slope} is below 1: give the first layer's share over the last's.")

    def weights(self, target: Target, keep: float | None) -> Tensor:
        parts = anatomy(target.model)
        return torch.linspace(self.slope, 1, len(parts.layers))[:, None].repeat(1, parts.kv_heads)


@claim("pyramid")
class PyramidBeatsUniform(BeatsUniform):
    statement: ClassVar[str] = (
        "first layers need more entries than last ones: at the same total, a pyramid is better than the same "
        "for all (section 5)"
    )
