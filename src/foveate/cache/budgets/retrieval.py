"""Retrieval: heads that copy from the far past keep everything."""

from __future__ import annotations

from typing import ClassVar

from foveate.cache.budgets.base import budget
from foveate.cache.budgets.heads import HeadsBudget
from foveate.cache.budgets.trial import FindsPasskeys
from foveate.claims import claim
from foveate.methods import Paper, Target, UnitScores
from foveate.scores import retrieval_of


@budget("retrieval")
class Retrieval(HeadsBudget):
    """By retrieval score: how often a head's most attended token is the one of the needle that is copied next.

    A KV head has the best score of its query heads. Scores are measured on needles in calibration text, once a model
    (some half a minute for the default one), and kept on disk.

    Fields:
        whole: the fraction of KV heads that keep everything. None: half of `keep` (a tenth, where the policy counts
            entries).

    Example:
        >>> import foveate as fv, torch
        >>> model, prompt = fv.tiny("llama"), torch.arange(3, 43).unsqueeze(0)
        >>> with fv.apply(model, "streaming:keep=0.5,budget=retrieval(whole=0.25)", tokenizer=fv.tiny_tokenizer()):
        ...     out = model(prompt, use_cache=True)
        >>> held = [held for layer in out.past_key_values.layers for held in layer.held()[0].tolist()]
        >>> sorted(held), len(held) * 20
        ([13, 13, 13, 13, 13, 13, 40, 40], 160)
    """

    paper: ClassVar[Paper | None] = Paper(
        "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024, "https://arxiv.org/abs/2404.15574"
    )
    claim: ClassVar[str] = "few heads retrieve from the far past; the rest do without it"

    def scores(self, target: Target) -> UnitScores:
        return retrieval_of(target)


@claim("retrieval")
class RetrievalFindsPasskeys(FindsPasskeys):
    statement: ClassVar[str] = (
        "a small part of the heads retrieves from the far past; keeping everything in these alone keeps "
        "retrieval, and keeping it in as many others does not (abstract)"
    )
