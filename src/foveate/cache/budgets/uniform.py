"""Uniform: every KV head may hold the same number of entries."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.budgets.base import Budget, budget
from foveate.methods import Target
from foveate.models.anatomy import anatomy


@budget("uniform")
class Uniform(Budget):
    """The same for every KV head of every layer.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "h2o:entries=8,budget=uniform"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> {int(held) for layer in out.past_key_values.layers for held in layer.held()[0]}
        {8}
    """

    claim: ClassVar[str] = "the same for all: the baseline of every other budget"

    def weights(self, target: Target, keep: float | None) -> Tensor:
        parts = anatomy(target.model)
        return torch.ones(len(parts.layers), parts.kv_heads)
