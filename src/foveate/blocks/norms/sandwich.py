"""Normalisation before and after each sublayer, within its branch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from foveate.backbone import Norm, Residual, Shape, norm
from foveate.methods import Paper


@norm("sandwich")
class Sandwich(Norm):
    """x + norm_out(f(norm_in(x))): what a sublayer writes has the same size whatever it computes, so that no value of
    it can explode. The stream itself is normalised only before the head.

    CogView's other measure, PB-relax, which rescales scores before softmax in float16, is not part of it.
    """

    paper = Paper(
        "CogView: Mastering Text-to-Image Generation via Transformers", 2021, "https://arxiv.org/abs/2105.13290"
    )
    claim = "keeps values from exploding layer by layer where training is in half precision"

    def build(self, shape: Shape) -> Residual:
        return SandwichResidual(shape)


class SandwichResidual(Residual):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = nn.RMSNorm(shape.width, eps=shape.eps)
        self.norm_out = nn.RMSNorm(shape.width, eps=shape.eps)

    def forward(self, x: Tensor, body: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.norm_out(body(self.norm(x)))
