"""Measured: heads that a reading scored highest keep everything."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from foveate.cache.budgets.base import budget
from foveate.cache.budgets.heads import HeadsBudget
from foveate.errors import FoveateError
from foveate.methods import Target, UnitScores
from foveate.models.anatomy import anatomy
from foveate.scores.file import load_scores


@budget("measured")
class Measured(HeadsBudget):
    """By scores of heads that `foveate read` measured, of any probe.

    A KV head has the best score of its query heads.

    Fields:
        file: the reading, or its folder.
        of: which scores, `probe.score`.
        whole: the fraction of KV heads that keep everything. None: half of `keep` (a tenth, where the policy counts
            entries).

    Example:
        >>> import tempfile, torch, foveate as fv
        >>> model, prompt = fv.planted(), torch.arange(3, 43).unsqueeze(0)
        >>> with tempfile.TemporaryDirectory() as out:
        ...     read = fv.read(model, ["induction"], tokenizer=fv.tiny_tokenizer(), length=64, out=out, show=False)
        ...     recipe = f"streaming:keep=0.5,budget=measured(file={out},of=induction.previous,whole=0.08)"
        ...     with fv.apply(model, recipe):
        ...         cache = model(prompt, use_cache=True).past_key_values
        >>> cache.layers[0].held()[0].tolist()           # head 0.1 looks at the token before, and keeps all
        [18, 40, 18, 18]
    """

    claim: ClassVar[str] = "scores of heads that were measured on the model say which of them need the far past"

    file: str
    of: str

    def scores(self, target: Target) -> UnitScores:
        scores = load_scores(self.file, self.of, target.model)
        parts = anatomy(target.model)
        return UnitScores("kv_head", _of_kv_heads(scores, parts.kv_heads, self.of))


def _of_kv_heads(scores: UnitScores, kv_heads: int, name: str) -> Tensor:
    if scores.kind == "head" and scores.scores.shape[1] % kv_heads == 0:
        groups = scores.scores.unflatten(1, (kv_heads, -1))
        return groups.nan_to_num(-float("inf")).amax(-1).masked_fill(groups.isnan().all(-1), float("nan"))
    if scores.kind == "kv_head" and scores.scores.shape[1] == kv_heads:
        return scores.scores
    raise FoveateError(
        f"budget=measured spreads entries over KV heads, and {name} scores units of kind {scores.kind}, "
        f"{scores.scores.shape[1]} a layer, where this model has {kv_heads} KV heads: give scores of its heads."
    )
