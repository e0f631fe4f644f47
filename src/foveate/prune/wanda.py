"""Structured Wanda: heads and channels with small weights on small inputs leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.methods import Paper, UnitScores, method
from foveate.models.anatomy import LayerParts
from foveate.plans import Spread, Uniform
from foveate.prune.base import Pruner
from foveate.prune.statistics import column_scores, inputs_of, weight_of
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("wanda")
class Wanda(Pruner):
    """Remove the KV heads and MLP channels with the smallest weights, weighed by the norm of their inputs.

    Wanda scores a weight by |weight| times the L2 norm of its input over calibration tokens. The structured extension
    is the FLAP paper's baseline: an input of `o` or `down` scores the mean over its column, a head the sum of its
    columns (here a KV head, with all query heads that it serves), and every layer loses as many.

    Fields:
        keep: the fraction of the parameters in the decoder layers that stays.
        budget: how what leaves is spread; by default `uniform`, since scores of layers are not comparable.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "wanda:keep=0.9", calibration=torch.arange(1, 65).unsqueeze(0)):
        ...     {layer.mlp.down_proj.in_features for layer in model.model.layers}
        {109}
    """

    paper: ClassVar[Paper | None] = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models", 2023, "https://arxiv.org/abs/2306.11695"
    )
    claim: ClassVar[str] = "weights times inputs tell better than weights alone what can leave"

    budget: Spread = Uniform()

    def score(self, model: PreTrainedModel, calibration: Tensor) -> Sequence[UnitScores]:
        inputs = inputs_of(model, calibration)

        def weighed(layer: LayerParts, role: str) -> Tensor | None:
            if (layer.index, role) not in inputs:
                return None
            return weight_of(getattr(layer, role)).abs().mean(dim=0) * inputs[layer.index, role].norm

        return column_scores(model, weighed)


@claim("wanda")
class InputsTellMoreThanWeights(Claim):
    statement: ClassVar[str] = (
        "pruning by weight times input norm significantly outperforms pruning by magnitude (abstract; there of single "
        "weights, here of heads and channels)"
    )
    setting: ClassVar[str] = (
        "keep=0.9 and 0.8 of the parameters in the layers, scored on 2,048 tokens of calibration text; 2,048 tokens of "
        "evaluation text; against the magnitude of the same columns"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, chunk=128), of=5)
        full = streams.read("full")
        metrics, checks = {"perplexity, whole model": full.perplexity}, {}
        for keep in (0.9, 0.8):
            wanda, magnitude = streams.read(f"wanda:keep={keep}"), streams.read(f"magnitude:keep={keep}")
            metrics[f"over whole, keep={keep}: structured Wanda"] = wanda.over(full)
            metrics[f"over whole, keep={keep}: magnitude"] = magnitude.over(full)
            checks[f"keep={keep}: better than magnitude"] = wanda.below(magnitude)
        return Finding(metrics, checks)
