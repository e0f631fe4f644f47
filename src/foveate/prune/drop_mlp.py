"""Dropping whole MLP sublayers that hardly change the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.methods import Paper, UnitScores, method
from foveate.models.anatomy import anatomy
from foveate.prune.base import Pruner
from foveate.prune.statistics import sublayer_change
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("drop-mlp")
class DropMlp(Pruner):
    """Remove the MLP sublayers whose output, residual included, is most like their input.

    The same score as `drop-attention`, 1 - cos(x, x + MLP(Norm(x))), as the paper does; the lowest leave in one shot.

    Fields: `keep`, the fraction of MLP sublayers that stay.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "drop-mlp:keep=0.5", calibration=torch.arange(1, 65).unsqueeze(0)):
        ...     sum(type(layer.mlp).__name__ == "NoMlp" for layer in model.model.layers)
        2
    """

    paper: ClassVar[Paper | None] = Paper(
        "What Matters in Transformers? Not All Attention is Needed", 2024, "https://arxiv.org/abs/2406.15786"
    )
    by: ClassVar[str] = "units"
    claim: ClassVar[str] = "MLP sublayers are needed more than attention: dropping as many costs more"

    def score(self, model: PreTrainedModel, calibration: Tensor) -> UnitScores:
        return UnitScores("mlp", sublayer_change(model, calibration)["mlp"])


@claim("drop-mlp")
class MlpsAreNeededMore(Claim):
    statement: ClassVar[str] = (
        "a large part of the attention sublayers can be dropped without loss, unlike MLPs and blocks (abstract)"
    )
    setting: ClassVar[str] = (
        "4 MLPs, scored on 2,048 tokens of calibration text; 2,048 tokens of evaluation text; against 4 attention "
        "sublayers by the same score, and 4 MLPs at random"
    )

    def run(self, bench: Bench) -> Finding:
        layers = len(anatomy(bench.model).layers)
        streams = Streams(bench, Perplexity(tokens=2048, chunk=128), of=4)
        full = streams.read("full")
        scored = streams.read(DropMlp(keep=1 - 4 / layers))
        attention = streams.read(f"drop-attention:keep={1 - 4 / layers}")
        random = streams.read(_DropRandom(keep=1 - 4 / layers))
        return Finding(
            {
                "perplexity, whole model": full.perplexity,
                "over whole: 4 MLPs, lowest cosine": scored.over(full),
                "over whole: 4 MLPs, random": random.over(full),
                "over whole: 4 attention sublayers": attention.over(full),
            },
            {
                "attention hurts less": attention.below(scored),
                "the score is better than chance": scored.below(random),
            },
        )


@dataclass(frozen=True, kw_only=True)
class _DropRandom(DropMlp):
    """The control, for the claim: sublayers drawn at random."""

    def score(self, model: PreTrainedModel, calibration: Tensor) -> UnitScores:
        generator = torch.Generator().manual_seed(0)
        return UnitScores("mlp", torch.rand(len(anatomy(model).layers), 1, generator=generator))
