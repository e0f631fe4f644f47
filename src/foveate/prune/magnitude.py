"""Magnitude: heads and channels with small weights leave. The baseline that looks at no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from foveate.methods import UnitScores, method
from foveate.models.surgery import has_attention, has_mlp
from foveate.plans import Spread, Uniform
from foveate.prune.base import Pruner
from foveate.prune.statistics import column_norms, column_scores


@method("magnitude")
class Magnitude(Pruner):
    """Remove the KV heads and MLP channels whose columns in `o` and `down` have the smallest L2 norm.

    Fields:
        keep: the fraction of the parameters in the decoder layers that stays.
        budget: how what leaves is spread; by default every layer loses as many.

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "magnitude:keep=0.9"):   # no text is needed
        ...     {layer.mlp.down_proj.in_features for layer in model.model.layers}
        {109}
    """

    reads: ClassVar[bool] = False
    claim: ClassVar[str] = "the baseline: what has small weights leaves"

    budget: Spread = Uniform()

    def score(self, model: PreTrainedModel, calibration: Tensor) -> Sequence[UnitScores]:
        return column_scores(
            model,
            lambda layer, role: (
                column_norms(getattr(layer, role))
                if (has_attention(layer) if role == "o" else has_mlp(layer))
                else None
            ),
            over_head=lambda columns: columns.norm(dim=1),
        )
