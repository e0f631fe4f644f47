"""Normalisation after each addition."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from foveate.backbone import Norm, Residual, Shape, norm
from foveate.methods import Paper


@norm("post")
class Post(Norm):
    """norm(x + f(x)): the stream keeps its variance, and gradients shrink towards the first layers."""

    paper = Paper("Attention Is All You Need", 2017, "https://arxiv.org/abs/1706.03762")
    claim = "keeps the residual stream's variance the same at every depth"
    final = False

    def build(self, shape: Shape) -> Residual:
        return PostResidual(shape)


class PostResidual(Residual):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = nn.RMSNorm(shape.width, eps=shape.eps)

    def forward(self, x: Tensor, body: Callable[[Tensor], Tensor]) -> Tensor:
        return self.norm(x + body(x))
