"""Normalisation before each sublayer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from foveate.backbone import Norm, Residual, Shape, norm
from foveate.methods import Paper


@norm("pre")
class Pre(Norm):
    """x + f(norm(x)): the stream itself is never normalised, and its variance grows with depth."""

    paper = Paper("On Layer Normalization in the Transformer Architecture", 2020, "https://arxiv.org/abs/2002.04745")
    claim = "trains without a warm-up, as gradients at the start are the same at every depth"

    def build(self, shape: Shape) -> Residual:
        return PreResidual(shape)


class PreResidual(Residual):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = nn.RMSNorm(shape.width, eps=shape.eps)

    def forward(self, x: Tensor, body: Callable[[Tensor], Tensor]) -> Tensor:
        return x + body(self.norm(x))
