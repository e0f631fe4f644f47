"""Scored: what a reading scored lowest leaves."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from foveate.errors import FoveateError
from foveate.methods import UnitScores, method
from foveate.models.surgery import KINDS
from foveate.prune.base import Pruner
from foveate.scores.file import load_scores


@method("scored")
class Scored(Pruner):
    """Remove the units that have the lowest scores in a reading: attention sublayers, MLPs, layers, heads.

    Fields:
        keep: the fraction of the scored units that stays.
        file: the reading (`foveate read MODEL --out DIR`), or its folder.
        of: which scores, `probe.score`.
        budget: how what leaves is spread over layers: `global` or `uniform`.

    Example:
        >>> import tempfile, foveate as fv
        >>> model = fv.tiny("llama")
        >>> with tempfile.TemporaryDirectory() as out:
        ...     read = fv.read(model, ["layers"], tokenizer=fv.tiny_tokenizer(), length=64, out=out, show=False)
        ...     with fv.apply(model, f"scored:keep=0.5,file={out},of=layers.attention"):
        ...         [type(layer.attention).__name__ for layer in fv.anatomy(model).layers].count("NoAttention")
        2
    """

    by: ClassVar[str] = "units"
    reads: ClassVar[bool] = False
    claim: ClassVar[str] = "scores that were measured on the model say what can leave it"

    file: str
    of: str

    def score(self, model: PreTrainedModel, calibration: Tensor) -> UnitScores:
        scores = load_scores(self.file, self.of, model)
        if scores.kind not in KINDS:
            raise FoveateError(
                f"scored: {self.of} scores units of kind {scores.kind}, which can't be cut: give scores of "
                f"{', '.join(KINDS)}."
            )
        return scores
