"""A gated MLP."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from foveate.backbone import Channel, ChannelMixer, Shape, channel
from foveate.backbone.parts import linear
from foveate.errors import FoveateError
from foveate.methods import Paper


@channel("gated")
class Gated(Channel):
    """down(silu(gate(x)) * up(x)).

    Fields:
        times: channels inside, as a multiple of the width; rounded to a multiple of 8.
    """

    paper = Paper("GLU Variants Improve Transformer", 2020, "https://arxiv.org/abs/2002.05202")
    claim = "loses less than an MLP of as many parameters"

    times: float = 2.67

    def __post_init__(self) -> None:
        if self.times <= 0:
            raise FoveateError(f"{self}: times must be above 0.")

    def build(self, shape: Shape) -> ChannelMixer:
        return GatedMixer(shape.width, max(8, 8 * round(self.times * shape.width / 8)))


class GatedMixer(ChannelMixer):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_up = linear(width, 2 * inner)
        self.out = linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.out(functional.silu(gate) * up)
