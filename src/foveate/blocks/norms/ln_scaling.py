"""Pre-norm whose norms are scaled down with depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from foveate.backbone import Norm, Residual, Shape, norm
from foveate.blocks.norms.trial import deep_models, figures, paired
from foveate.claims import Claim, Finding, claim
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes


@norm("ln-scaling")
class LNScaling(Norm):
    """x + f(norm(x) / sqrt(l)) in layer l = 1, 2, ...: what layers add shrinks with depth, so that the stream's
    variance grows slowly, and a deep layer still moves what it is given.

    Both norms of a layer are scaled, the one before the head is not. The authors advise against joining this with a
    start that scales down what writes into the stream, so that the backbone leaves that out under this placement.
    """

    paper = Paper("The Curse of Depth in Large Language Models", 2025, "https://arxiv.org/abs/2502.05795")
    claim = "lets deep layers matter, and learns better than pre-norm for it"
    small_start = False

    def build(self, shape: Shape) -> Residual:
        return LNScalingResidual(shape)


class LNScalingResidual(Residual):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = nn.RMSNorm(shape.width, eps=shape.eps)
        self.scale = 1 / math.sqrt(shape.layer + 1)

    def forward(self, x: Tensor, body: Callable[[Tensor], Tensor]) -> Tensor:
        return x + body(self.norm(x) * self.scale)


@claim("ln-scaling")
class LNScalingClaim(Claim):
    statement: ClassVar[str] = (
        "norms scaled by 1 / sqrt(layer) slow the growth of the residual stream's variance with depth, make deep "
        "layers matter more, and predict better than plain pre-norm"
    )
    setting: ClassVar[str] = (
        "byte models of 16 layers and width 96 learn prose and code for 400 steps of 32 passages of 128 bytes, with 3 "
        "seeds, pre and ln-scaling on the same batches, all matrices started alike; profiles over 64 validation "
        "passages. Short training of small models: the paper trains from 130 million weights up, and far longer"
    )
    reads = False
    steps: int = 400
    layers: int = 16
    width: int = 96
    length: int = 128
    batch: int = 32
    examples: int = 512
    seeds: tuple[int, ...] = (0, 1, 2)

    def run(self, bench: Bench) -> Finding:
        settings = Settings(steps=self.steps, batch=self.batch)
        found = deep_models(
            {
                name: (Sizes(width=self.width, layers=self.layers, norm=name), settings)
                for name in ("pre", "ln-scaling")
            },
            length=self.length,
            examples=self.examples,
            seeds=self.seeds,
            device=bench.model.device,
            progress=bench.progress,
        )
        ours, pre = found["ln-scaling"], found["pre"]
        loss = paired(ours, pre, lambda run: run.loss)
        # Growth is compared in logarithms, as variances are ratios.
        start = paired(ours, pre, lambda run: math.log(run.start.growth("variance")))
        end = paired(ours, pre, lambda run: math.log(run.end.growth("variance")))
        damage = paired(ours, pre, lambda run: run.end.deep("damage"))
        return Finding(
            {
                **figures(found),
                "nats a byte, ln-scaling less pre": loss,
                "log of the variance's growth at the start, ln-scaling less pre": start,
                "log of the variance's growth at the end, ln-scaling less pre": end,
                "nats lost without one layer of the deep half, ln-scaling less pre": damage,
            },
            {
                "the variance grows less over layers at the start": start.high < 0,
                "the variance grows less over layers at the end": end.high < 0,
                "without one layer of the deep half it loses more than pre": damage.low > 0,
                "it predicts better than pre": loss.high < 0,
            },
        )
