"""Normalisation round each sublayer, and of the embeddings."""

from __future__ import annotations

import math
from typing import ClassVar

from foveate.backbone import Norm, Residual, Shape, norm
from foveate.blocks.norms.sandwich import SandwichResidual
from foveate.blocks.norms.trial import deep_models, figures, paired
from foveate.claims import Claim, Finding, claim
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes


@norm("peri-ln")
class PeriLN(Norm):
    """x_0 = norm(embedding); x + norm_out(f(norm_in(x))) at each sublayer; norm before the head.

    Each sublayer adds a variance of about 1, so that the stream's grows in line with depth, where pre-norm's may grow
    exponentially in training and post-norm's does not grow. It is `sandwich` with the embeddings normalised.
    """

    paper = Paper(
        "Peri-LN: Revisiting Layer Normalization in the Transformer Architecture",
        2025,
        "https://arxiv.org/abs/2502.02732",
    )
    claim = "has a stream whose variance grows evenly, and trains more steadily than pre-norm"
    embedding = True

    def build(self, shape: Shape) -> Residual:
        return SandwichResidual(shape)


@claim("peri-ln")
class PeriLNClaim(Claim):
    statement: ClassVar[str] = (
        "with a norm on both sides of each sublayer, variance grows more evenly over layers than with pre-norm, no "
        "value becomes massive, gradients are steadier, and training converges better and bears higher learning rates"
    )
    setting: ClassVar[str] = (
        "byte models of 12 layers and width 96 learn prose and code for 300 steps of 32 passages of 128 bytes, with 3 "
        "seeds, pre and peri-ln on the same batches, all matrices started alike, at learning rates of 0.001 and 0.01; "
        "a model whose loss stops being a number counts as a uniform guess; profiles over 64 validation passages. "
        "Short training of small models: the paper trains from 400 million weights up, and far longer"
    )
    reads = False
    steps: int = 300
    layers: int = 12
    width: int = 96
    length: int = 128
    batch: int = 32
    examples: int = 512
    rates: tuple[float, float] = (1e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)

    def run(self, bench: Bench) -> Finding:
        found = deep_models(
            {
                f"{name}, rate {rate:g}": (
                    Sizes(width=self.width, layers=self.layers, norm=name),
                    Settings(steps=self.steps, batch=self.batch, lr=rate),
                )
                for rate in self.rates
                for name in ("pre", "peri-ln")
            },
            length=self.length,
            examples=self.examples,
            seeds=self.seeds,
            device=bench.model.device,
            progress=bench.progress,
        )
        (ours, pre), (ours_high, pre_high) = (
            (found[f"peri-ln, rate {rate:g}"], found[f"pre, rate {rate:g}"]) for rate in self.rates
        )
        loss = paired(ours, pre, lambda run: run.loss)
        loss_high = paired(ours_high, pre_high, lambda run: run.loss)
        # Ratios and sizes are compared in logarithms.
        growth = paired(ours, pre, lambda run: math.log(run.end.growth("variance")))
        largest = paired(ours, pre, lambda run: math.log(float(run.end.largest.max())))
        gradients = paired(ours, pre, lambda run: run.end.spread("gradient"))
        return Finding(
            {
                **figures(found),
                **{
                    f"models that diverged, {name}": Metric.exact(sum(run.diverged for run in runs))
                    for name, runs in found.items()
                },
                "nats a byte, peri-ln less pre": loss,
                "nats a byte at the high rate, peri-ln less pre": loss_high,
                "log of the variance's growth at the end, peri-ln less pre": growth,
                "log of the stream's largest value at the end, peri-ln less pre": largest,
                "unevenness of gradients at the end, peri-ln less pre": gradients,
            },
            {
                "the variance grows less over layers than pre's": growth.high < 0,
                "the stream's largest value is smaller than pre's": largest.high < 0,
                "its gradients are more even over layers than pre's": gradients.high < 0,
                "it predicts better than pre": loss.high < 0,
                "it predicts better than pre at ten times the learning rate": loss_high.high < 0,
            },
        )
