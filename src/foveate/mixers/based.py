"""Based: linear attention whose features are a Taylor series of exp, and a small sliding window, layer by layer."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.mixers.softmax import SoftmaxMixer
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes
from foveate.train.trial import by_seed, differences, held_bytes, over_seeds


@mixer("based")
class Based(Mixer):
    """Linear attention with second-order Taylor features in layers 0, 2, .., softmax attention in a window in 1, 3, ..

    With s = q . k / sqrt(feature) the weights of the linear layers are 1 + s + s^2 / 2, close to exp(s):

        phi(x) = (1, x_i, x_i x_j / sqrt 2),  x = q or k over feature^(1/4),
        y_t = sum_(j<=t) phi(q_t) . phi(k_j) v_j / sum_(j<=t) phi(q_t) . phi(k_j):

    the recurrence with A = 1 and a column of ones beside v. As x_i x_j = x_j x_i, the pairs with i < j are held once,
    times sqrt 2: the same weights with 1 + f + f (f + 1) / 2 features in place of 1 + f + f^2. The weights are
    ((1 + s)^2 + 1) / 2, so at least 1/2. The layers with a window have rotary positions.

    The paper's models have such layers in turn, too, among layers of gated convolutions; for these stands the
    backbone's own `conv`. Ours: that pairs are held once (the authors' code holds all f^2 products), and which layer
    comes first in a model without convolutions. A model of one layer has the linear part alone.

    Fields:
        feature: channels of a query and a key before the series; 0: all layers have the window.
        window: tokens that a layer with a window sees, its own among them; 0: all layers are linear.
    """

    paper = Paper(
        "Simple linear attention language models balance the recall-throughput tradeoff",
        2024,
        "https://arxiv.org/abs/2402.18668",
    )
    claim = "recalls more than linear attention or a window alone, for the same state"

    feature: int = 16
    window: int = 16

    def __post_init__(self) -> None:
        if min(self.feature, self.window) < 0 or not self.feature + self.window:
            raise FoveateError(f"{self}: feature and window must be 0 or more, and not both 0: give one of them.")

    def build(self, shape: Shape) -> TokenMixer:
        if self.feature and (not self.window or shape.layer % 2 == 0):
            return TaylorMixer(shape, self.feature)
        if shape.head % 2:
            raise FoveateError(
                f"based: rotary positions need heads of an even size, not {shape.head}: give another number of heads, "
                "or window=0."
            )
        return SoftmaxMixer(shape, shape.heads, self.window, rope=True)


def taylor(x: Tensor) -> Tensor:
    """Features whose products are 1 + s + s^2 / 2, s = q . k / sqrt(f): (.., f) to (.., 1 + f + f (f + 1) / 2).

    Example:
        >>> taylor(torch.tensor([2.0, 0.0])).shape
        torch.Size([6])
    """
    f = x.shape[-1]
    x = x * f**-0.25
    i, j = torch.triu_indices(f, f, device=x.device)
    times = torch.where(i == j, math.sqrt(0.5), 1.0).to(x.dtype)  # 1 / sqrt 2, and sqrt 2 times that for two of a kind
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * times], -1)


class TaylorMixer(TokenMixer):
    """Args: the shape; channels of a query and a key."""

    def __init__(self, shape: Shape, feature: int):
        super().__init__()
        self.heads, self.head, self.feature = shape.heads, shape.head, feature
        self.qk = linear(shape.width, 2 * shape.heads * feature)
        self.v = linear(shape.width, shape.width)
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        size, dtype = (
            1 + self.feature + self.feature * (self.feature + 1) // 2,
            torch.promote_types(like.dtype, torch.float),
        )
        return {"memory": like.new_zeros(batch, self.heads, size, self.head + 1, dtype=dtype)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k = split_heads(self.qk(x), 2 * self.heads).to(torch.promote_types(x.dtype, torch.float)).chunk(2, 2)
        v = functional.pad(split_heads(self.v(x), self.heads).to(q.dtype), (0, 1), value=1.0)
        total, memory = recurrence(taylor(q), taylor(k), v, None, None if state is None else state["memory"])
        y = (total[..., :-1] / total[..., -1:]).to(x.dtype)
        return self.out(y.flatten(2)), None if state is None else {"memory": memory}


@claim("based")
class BasedClaim(Claim):
    statement: ClassVar[str] = (
        "linear attention with a Taylor feature map and a small sliding window together dial the state: recall rises "
        "with it, and is better than with either of them alone at the same size of the state"
    )
    setting: ClassVar[str] = (
        "multi-query associative recall of 16 pairs in 128 tokens, a vocabulary of 256; 2 layers of width 64, 2 heads, "
        "a convolution over 3 tokens before each mixer; 3 seeds, 500 steps of 64 texts; three sizes of the state, and "
        "linear and window alone at that of the middle one, within 3%"
    )
    reads = False
    steps: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)
    task: str = "mqar:pairs=16,length=128"

    def run(self, bench: Bench) -> Finding:
        mixers = {
            "small": "based:feature=4,window=8",
            "middle": "based:feature=8,window=16",
            "large": "based:feature=16,window=32",
            "linear alone": "based:feature=7,window=0",
            "window alone": "based:feature=0,window=20",
        }
        models = {name: Sizes(mixer=text, heads=2, conv=3) for name, text in mixers.items()}
        found = by_seed(
            self.task,
            models,
            Settings(steps=self.steps, lr=3e-3),
            device=bench.model.device,
            seeds=self.seeds,
            progress=bench.progress,
        )
        right = {name: over_seeds([each.scores["accuracy"] for each in runs]) for name, runs in found.items()}
        bytes_ = {name: held_bytes(runs[0].model, 128) for name, runs in found.items()}
        over = {
            f"{more} over {less}": differences(found[more], found[less], "accuracy")
            for more, less in (
                ("middle", "small"),
                ("large", "middle"),
                ("middle", "linear alone"),
                ("middle", "window alone"),
            )
        }
        alone = [bytes_["linear alone"], bytes_["window alone"]]
        return Finding(
            {
                **{f"accuracy, {name}": each for name, each in right.items()},
                **{f"accuracy, {name}": each for name, each in over.items()},
                **{f"state bytes, {name}": Metric.exact(each) for name, each in bytes_.items()},
            },
            {
                "recall rises with the state": right["small"].value < right["middle"].value < right["large"].value
                and differences(found["large"], found["small"], "accuracy").low > 0,
                "better than linear attention alone": over["middle over linear alone"].low > 0,
                "better than a window alone": over["middle over window alone"].low > 0,
                "the states compared are as large to 3%": all(
                    abs(each / bytes_["middle"] - 1) < 0.03 for each in alone
                ),
            },
        )
