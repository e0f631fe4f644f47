"""Each layer after the one before."""

from __future__ import annotations

from foveate.backbone import Order, Shape, Stack, stack


@stack("plain")
class Plain(Stack):
    """All layers see all tokens, each after the one before."""

    claim = "is what every transformer does"

    def build(self, shape: Shape) -> Order:
        return Order()
