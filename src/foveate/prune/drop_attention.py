"""Dropping whole attention sublayers that hardly change the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.methods import Paper, Recipe, UnitScores, method
from foveate.models.anatomy import anatomy
from foveate.prune.base import Pruner
from foveate.prune.statistics import sublayer_change
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("drop-attention")
class DropAttention(Pruner):
    """Remove the attention sublayers whose output, residual included, is most like their input.

    A sublayer's score is 1 - cos(x, x + Attention(Norm(x))), averaged over calibration tokens, as the paper
    does; the lowest scores leave in one shot, their weights and their part of the cache with them.

    Fields: `keep`, the fraction of attention sublayers that stay.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> whole = sum(p.numel() for p in model.parameters())
        >>> with fv.apply(model, "drop-attention:keep=0.5", calibration=torch.arange(1, 65).unsqueeze(0)):
        ...     sum(p.numel() for p in model.parameters()) < whole
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "What Matters in Transformers? Not All Attention is Needed", 2024, "https://arxiv.org/abs/2406.15786"
    )
    by: ClassVar[str] = "units"
    claim: ClassVar[str] = "many attention sublayers can leave with little loss, and the cache shrinks with them"

    def score(self, model: PreTrainedModel, calibration: Tensor) -> UnitScores:
        return UnitScores("attention", sublayer_change(model, calibration)["attention"])


@claim("drop-attention")
class CosineFindsWhatCanGo(Claim):
    statement: ClassVar[str] = (
        "attention sublayers that are chosen by cosine can be dropped with little loss (half of them in a 70B model, "
        "at 2.4% lower scores and 48% more speed); other layers of the same number cost far more (abstract)"
    )
    setting: ClassVar[str] = (
        "4 of the attention sublayers, scored on 2,048 tokens of calibration text; 2,048 tokens of evaluation text; "
        "against two random sets of 4 sublayers, and against skipping 4 whole layers; cache at its end"
    )

    def run(self, bench: Bench) -> Finding:
        layers = len(anatomy(bench.model).layers)
        task = Perplexity(tokens=2048, chunk=128)
        streams = Streams(bench, task, of=5)
        full = streams.read("full")
        scored = DropAttention(keep=1 - 4 / layers)
        dropped = streams.read(scored)
        blocks = streams.read(f"skip-layers:keep={1 - 4 / layers}")
        random = [streams.read(_DropRandom(keep=1 - 4 / layers, seed=seed)) for seed in (0, 1)]
        cache = task.measure(bench, Recipe.of(scored)).metrics["cache_fraction"]
        return Finding(
            {
                "perplexity, whole model": full.perplexity,
                "over whole: lowest cosine dropped": dropped.over(full),
                "over whole: random, first set": random[0].over(full),
                "over whole: random, second set": random[1].over(full),
                "over whole: as many whole layers skipped": blocks.over(full),
                "cache, fraction": cache,
            },
            {
                "little loss (within 5%)": dropped.over(full).value < 1.05,
                "better than both random sets": all(dropped.below(other) for other in random),
                "better than skipping as many whole layers": dropped.below(blocks),
                "the cache shrinks by what was dropped": abs(cache.value - (1 - 4 / layers)) < 1e-3,
            },
        )


@dataclass(frozen=True, kw_only=True)
class _DropRandom(DropAttention):
    """The control, for the claim: sublayers drawn at random."""

    seed: int

    def score(self, model: PreTrainedModel, calibration: Tensor) -> UnitScores:
        generator = torch.Generator().manual_seed(self.seed)
        return UnitScores("attention", torch.rand(len(anatomy(model).layers), 1, generator=generator))
