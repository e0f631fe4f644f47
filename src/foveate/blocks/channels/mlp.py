"""A plain MLP."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from foveate.backbone import Channel, ChannelMixer, Shape, channel
from foveate.backbone.parts import linear
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.specs import nearest


def _squared_relu(x: Tensor) -> Tensor:
    return functional.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "relu2": _squared_relu,
    "silu": functional.silu,
}


@channel("mlp")
class Mlp(Channel):
    """down(activation(up(x))), without biases.

    Fields:
        times: channels inside, as a multiple of the width; rounded to a multiple of 8.
        activation: `gelu`, `relu`, `relu2` (the square of relu) or `silu`.
    """

    paper = Paper("Attention Is All You Need", 2017, "https://arxiv.org/abs/1706.03762")
    claim = "works on each token by itself, at a cost that any other channel mixer is measured by"

    times: float = 4.0
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.times <= 0:
            raise FoveateError(f"{self}: times must be above 0.")
        if self.activation not in ACTIVATIONS:
            raise FoveateError(
                f"mlp: there is no activation {self.activation!r}: {nearest(self.activation, ACTIVATIONS)}"
            )

    def build(self, shape: Shape) -> ChannelMixer:
        return MlpMixer(shape.width, max(8, 8 * round(self.times * shape.width / 8)), ACTIVATIONS[self.activation])


class MlpMixer(ChannelMixer):
    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.up = linear(width, inner)
        self.out = linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))
