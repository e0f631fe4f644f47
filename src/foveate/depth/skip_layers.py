"""Unified layer skipping: the same evenly spaced layers are left out for every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.claims import Claim, Finding, Streams, claim
from foveate.depth.base import DepthPlan, layers_of
from foveate.errors import FoveateError
from foveate.methods import Paper, Recipe, check_fraction, method
from foveate.models.anatomy import Anatomy
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity
from foveate.tasks.speed import Speed


def spread(layers: int, skipped: int) -> list[int]:
    """`skipped` indices, evenly spaced over the layers between the first and the last.

    Example:
        >>> spread(12, 2)
        [3, 8]
    """
    between = layers - 2
    return [1 + (2 * i + 1) * between // (2 * skipped) for i in range(skipped)]


@method("skip-layers")
class SkipLayers(DepthPlan):
    """Run a fixed fraction of the layers; those left out are spaced evenly, the first and the last always run.

    The number of layers follows from the target speed-up alone, as in the paper: `keep` is its inverse, so
    a target of 1.25 is `keep=0.8`. Batches and caches work unchanged, because every token skips the same layers. The
    paper's released code fine-tunes the model with the layers left out; here it is used as it is. Which layers
    are the balanced ones the abstract leaves open; here the gaps between them are equal. Layers that have left already
    don't count.

    Fields: `keep`, the fraction of layers that run, in (0, 1].

    Example:
        >>> import foveate as fv
        >>> SkipLayers(keep=0.5).plan(fv.anatomy(fv.tiny("llama", num_hidden_layers=6)))
        [0, 2, 5]
    """

    paper: ClassVar[Paper | None] = Paper(
        "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy",
        2024,
        "https://arxiv.org/abs/2404.06954",
    )
    claim: ClassVar[str] = "evenly spaced layers hurt less when skipped than a block of neighbours"

    keep: float

    def __post_init__(self) -> None:
        check_fraction(self.name, self.keep)

    def plan(self, parts: Anatomy) -> list[int]:
        there = layers_of(parts)
        layers = len(there)
        skipped = layers - round(self.keep * layers)
        if skipped > layers - 2:
            raise FoveateError(
                f"skip-layers: keep={self.keep} would skip {skipped} of {layers} layers, but the first and the last "
                f"always run: keep at least {2 / layers:.2f}."
            )
        out = set(spread(layers, skipped))
        return [layer for i, layer in enumerate(there) if i not in out]


@dataclass(frozen=True, kw_only=True)
class _SkipBlock(SkipLayers):
    """The alternatives, for the claim: as many neighbouring layers, from the middle or from the top on."""

    where: str

    def plan(self, parts: Anatomy) -> list[int]:
        layers, run = len(parts.layers), len(super().plan(parts))
        first = {"middle": run // 2, "top": run - 1, "exit": run}[self.where]
        return [*range(first), *range(first + layers - run, layers)]


@claim("skip-layers")
class SpreadOutHurtsLess(Claim):
    statement: ClassVar[str] = (
        "skipping evenly spaced layers keeps more quality than skipping neighbours or exiting early, and gives the "
        "speed-up that was aimed at (abstract; the paper's released code fine-tunes for it, this experiment does not)"
    )
    setting: ClassVar[str] = (
        "keep=0.9 and 0.8; 2,048 tokens of evaluation text; against as many neighbouring layers from the "
        "middle, before the last layer, and at the end; prefill of 512 tokens timed in alternation with the whole model"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, chunk=128), of=11)
        full = streams.read("full")
        metrics = {"perplexity, whole model": full.perplexity}
        checks = {}
        for keep in (0.9, 0.8):
            spread_out = streams.read(SkipLayers(keep=keep))
            metrics[f"over whole, keep={keep}: evenly spaced"] = spread_out.over(full)
            for where, words in (("middle", "from the middle"), ("top", "before the last"), ("exit", "at the end")):
                block = streams.read(_SkipBlock(keep=keep, where=where))
                metrics[f"over whole, keep={keep}: neighbours {words}"] = block.over(full)
                checks[f"keep={keep}: better than neighbours {words}"] = spread_out.below(block)
        speed = Speed(prompt=512, tokens=8, repeats=7).measure(bench, Recipe.of("skip-layers:keep=0.8"))
        metrics["prefill speed-up, keep=0.8"] = speed.metrics["prefill_speedup"]
        checks["at least 0.85 of the speed-up aimed at (1.25)"] = speed.metrics["prefill_speedup"].value > 0.85 * 1.25
        return Finding(metrics, checks)
