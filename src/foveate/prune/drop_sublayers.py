"""Dropping attention and MLP sublayers together, whichever change the residual stream least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.methods import Paper, UnitScores, method
from foveate.models.anatomy import anatomy
from foveate.prune.base import Pruner
from foveate.prune.statistics import sublayer_change
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("drop-sublayers")
class DropSublayers(Pruner):
    """Remove the sublayers, attention or MLP, whose output, residual included, is most like their input.

    The paper's joint variant: both sorts are scored by one minus the cosine, as in `drop-attention`, and ranked in
    one list.

    Fields: `keep`, the fraction of sublayers that stay: of two for each layer.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> whole = sum(p.numel() for p in model.parameters())
        >>> with fv.apply(model, "drop-sublayers:keep=0.5", calibration=torch.arange(1, 65).unsqueeze(0)):
        ...     sum(p.numel() for p in model.parameters()) < whole
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "What Matters in Transformers? Not All Attention is Needed", 2024, "https://arxiv.org/abs/2406.15786"
    )
    by: ClassVar[str] = "units"
    claim: ClassVar[str] = "ranked together, more attention and MLP sublayers can leave than of either sort alone"

    def score(self, model: PreTrainedModel, calibration: Tensor) -> Sequence[UnitScores]:
        change = sublayer_change(model, calibration)
        return [UnitScores(kind, change[kind]) for kind in ("attention", "mlp")]


@claim("drop-sublayers")
class TogetherMoreCanGo(Claim):
    statement: ClassVar[str] = (
        "dropping attention and MLP sublayers jointly allows more aggressive dropping (abstract; Llama-2-13B keeps 90% "
        "on MMLU with 31 sublayers dropped)"
    )
    setting: ClassVar[str] = (
        "8 sublayers, scored on 2,048 tokens of calibration text; 2,048 tokens of evaluation text; against 8 attention "
        "sublayers, 8 MLPs, and 4 whole layers, all chosen by the same cosine"
    )

    def run(self, bench: Bench) -> Finding:
        layers = len(anatomy(bench.model).layers)
        streams = Streams(bench, Perplexity(tokens=2048, chunk=128), of=5)
        full = streams.read("full")
        joint = streams.read(DropSublayers(keep=1 - 4 / layers))
        others = {
            "8 attention sublayers": streams.read(f"drop-attention:keep={1 - 8 / layers}"),
            "8 MLPs": streams.read(f"drop-mlp:keep={1 - 8 / layers}"),
            "4 whole layers": streams.read(_DropLayers(keep=1 - 4 / layers)),
        }
        return Finding(
            {
                "perplexity, whole model": full.perplexity,
                "over whole: 8 sublayers, both sorts": joint.over(full),
                **{f"over whole: {words}": other.over(full) for words, other in others.items()},
            },
            {
                "no worse than as many attention sublayers": joint.over(others["8 attention sublayers"]).low <= 1,
                "better than as many MLPs": joint.below(others["8 MLPs"]),
                "better than half as many whole layers": joint.below(others["4 whole layers"]),
            },
        )


@dataclass(frozen=True, kw_only=True)
class _DropLayers(DropSublayers):
    """Whole layers by the same cosine, for the claim."""

    def score(self, model: PreTrainedModel, calibration: Tensor) -> Sequence[UnitScores]:
        return [UnitScores("layer", sublayer_change(model, calibration)["layer"])]
