"""Gates: heads whose view of the far past is worth most keep everything."""

from __future__ import annotations

from typing import ClassVar

from foveate.cache.budgets.base import budget
from foveate.cache.budgets.heads import HeadsBudget
from foveate.cache.budgets.trial import FindsPasskeys
from foveate.claims import claim
from foveate.methods import Paper, Target, UnitScores
from foveate.scores import gates_of


@budget("gates")
class Gates(HeadsBudget):
    """By gate score: what a KV head's view of the far past adds to the log-probability of answers and of plain text.

    Integrated gradients over gates that blend full with thin attention (`foveate.scores.gate_scores`). Beside the heads
    that copy it finds those that feed them, which a retrieval score misses. Scores are measured on needles in
    calibration text and on that text, once a model (a minute or two for the default one), and kept on disk.

    Fields:
        whole: the fraction of KV heads that keep everything. None: half of `keep` (a tenth, where the policy counts
            entries).

    Example:
        >>> import foveate as fv, torch
        >>> model, prompt = fv.tiny("llama"), torch.arange(3, 43).unsqueeze(0)
        >>> with fv.apply(model, "streaming:keep=0.5,budget=gates(whole=0.25)", tokenizer=fv.tiny_tokenizer()):
        ...     out = model(prompt, use_cache=True)
        >>> sorted(held for layer in out.past_key_values.layers for held in layer.held()[0].tolist())
        [13, 13, 13, 13, 13, 13, 40, 40]
    """

    paper: ClassVar[Paper | None] = Paper(
        "Axiomatic Attribution for Deep Networks", 2017, "https://arxiv.org/abs/1703.01365"
    )
    claim: ClassVar[str] = "integrated gradients find the heads that need the far past, those that feed copying too"

    def scores(self, target: Target) -> UnitScores:
        return gates_of(target)


@claim("gates")
class GatesFindsPasskeys(FindsPasskeys):
    statement: ClassVar[str] = (
        "keeping everything in the heads whose view of the far past adds most to answers and text keeps "
        "retrieval, and keeping it in as many others does not (ours)"
    )
