"""Linear attention: a sum of outer products in place of a cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.methods import Paper


@mixer("linear")
class Linear(Mixer):
    """Linear attention with features elu(x) + 1, normalised by the sum of its weights.

    The recurrence with A = 1, k_t = phi(k), and a column of ones beside v that gives the sum.
    """

    paper = Paper(
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        2020,
        "https://arxiv.org/abs/2006.16236",
    )
    claim = "costs time linear in the length, and a state of fixed size that forgets beyond it"

    def build(self, shape: Shape) -> TokenMixer:
        return LinearMixer(shape)


class LinearMixer(TokenMixer):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.head = shape.heads, shape.head
        self.qkv = linear(shape.width, 3 * shape.width)
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {"memory": like.new_zeros(batch, self.heads, self.head, self.head + 1, dtype=dtype)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        q, k = (functional.elu(each) + 1 for each in (q, k))
        total, memory = recurrence(
            q, k, functional.pad(v, (0, 1), value=1.0), None, None if state is None else state["memory"]
        )
        y = total[..., :-1] / total[..., -1:].clamp_min(1e-6)
        return self.out(y.flatten(2)), None if state is None else {"memory": memory}
