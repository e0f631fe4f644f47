"""FLAP: heads and channels that hardly fluctuate leave, and their mean stays as a bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.methods import Paper, UnitScores, method
from foveate.models.anatomy import LayerParts
from foveate.models.surgery import Means
from foveate.prune.base import Pruner
from foveate.prune.statistics import column_norms, column_scores, inputs_of, means_of
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("flap")
class Flap(Pruner):
    """Remove the KV heads and MLP channels whose output varies least, and put their mean into a bias.

    An input of the map that writes to the residual stream (`o`, `down`) scores its variance over calibration tokens
    times the squared norm of its column (the paper's weighted fluctuation metric). These scores are standardised in
    each layer, so that one threshold serves all layers, heads and channels; a head scores the mean of its columns.
    What leaves is weighed by its parameters. The constant part of what left, mean input times column, is added to the
    map's bias, which is made where there is none.

    The paper prunes heads of its own; where KV heads are shared, a unit here is a KV head with all query heads that it
    serves.

    Fields:
        keep: the fraction of the parameters in the decoder layers that stays.
        budget: how what leaves is spread; the paper's own is `global`.
        compensate: whether the mean of what leaves stays as a bias.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "flap:keep=0.8", calibration=torch.arange(1, 65).unsqueeze(0)):
        ...     sum(p.numel() for p in model.model.layers.parameters()) < 0.82 * 147968
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        2023,
        "https://arxiv.org/abs/2312.11983",
    )
    claim: ClassVar[str] = "without training, it loses less than structured Wanda, and compensation is part of that"

    compensate: bool = True

    def score(self, model: PreTrainedModel, calibration: Tensor) -> Sequence[UnitScores]:
        inputs = inputs_of(model, calibration)

        def fluctuation(layer: LayerParts, role: str) -> Tensor | None:
            if (layer.index, role) not in inputs:
                return None
            raw = inputs[layer.index, role].variance * column_norms(getattr(layer, role)) ** 2
            return (raw - raw.mean()) / raw.std().clamp(min=1e-30)

        return column_scores(model, fluctuation, over_head=lambda columns: columns.mean(dim=1))

    def means(self, model: PreTrainedModel, calibration: Tensor) -> Means | None:
        return means_of(model, calibration) if self.compensate else None


@claim("flap")
class FluctuationIsWhatMatters(Claim):
    statement: ClassVar[str] = (
        "without retraining, FLAP significantly outperforms Wanda extended to structured pruning (abstract), and bias "
        "compensation reduces what is lost"
    )
    setting: ClassVar[str] = (
        "keep=0.8 of the parameters in the layers, scored on 2,048 tokens of calibration text; 2,048 tokens of "
        "evaluation text; against structured Wanda (as many of each layer), column magnitude, and no compensation"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, chunk=128), of=5)
        full = streams.read("full")
        flap = streams.read("flap:keep=0.8")
        plain = streams.read("flap:keep=0.8,compensate=false")
        wanda = streams.read("wanda:keep=0.8")
        magnitude = streams.read("magnitude:keep=0.8")
        return Finding(
            {
                "perplexity, whole model": full.perplexity,
                "over whole: FLAP": flap.over(full),
                "over whole: FLAP without compensation": plain.over(full),
                "over whole: structured Wanda": wanda.over(full),
                "over whole: magnitude": magnitude.over(full),
                "FLAP over structured Wanda": flap.over(wanda),
                "FLAP over FLAP without compensation": flap.over(plain),
            },
            {
                "better than structured Wanda": flap.below(wanda),
                "compensation helps": flap.below(plain),
            },
        )
