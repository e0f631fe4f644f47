"""Gated linear attention: each channel of the memory forgets at a rate that each token chooses."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import by_seed, differences, over_seeds


@mixer("gated-linear")
class GatedLinear(Mixer):
    """S_t = diag(a_t) S_(t-1) + k_t v_t', with a gate for each channel of the keys that hangs on the token:

        a_t = sigmoid(W_2 W_1 x_t + b)^(1 / normaliser),    o_t = S_t' q_t / sqrt(d),
        y_t = W_o (swish(W_r x_t + b_r) * norm(o_t)).

    W_2 W_1 is of low rank, so that the gate is cheap; the power keeps a_t near 1 at the start, so that memories last.
    The norm is over each head (RMS). Queries and keys have no feature map, and nothing divides by a sum of weights.
    The recurrence with A = diag(a_t).

    Fields:
        rank: of the gate's map.
        normaliser: what the gate's logarithm is divided by; 0: no gate, nothing is forgotten (for comparison).
        keys: channels of queries and keys, as a fraction of the width; values have the whole.
    """

    paper = Paper(
        "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, "https://arxiv.org/abs/2312.06635"
    )
    claim = "comes near softmax attention with a state of fixed size, and reads longer texts than it learned from"

    rank: int = 16
    normaliser: float = 16.0
    keys: float = 0.5

    def __post_init__(self) -> None:
        if self.rank < 1 or self.normaliser < 0 or self.keys <= 0:
            raise FoveateError(f"{self}: rank must be 1 or more, normaliser 0 or more, and keys above 0.")

    def build(self, shape: Shape) -> TokenMixer:
        feature = round(self.keys * shape.width) // shape.heads
        if feature < 1:
            raise FoveateError(
                f"gated-linear: keys={self.keys} of a width of {shape.width} leave no channel to each of {shape.heads} "
                "heads: give more keys, or fewer heads."
            )
        return GatedLinearMixer(shape, feature, self.rank, self.normaliser)


class GatedLinearMixer(TokenMixer):
    """Args: the shape; channels of a head's keys; the gate's rank; what its logarithm is divided by, or 0."""

    def __init__(self, shape: Shape, feature: int, rank: int, normaliser: float):
        super().__init__()
        self.heads, self.head, self.feature, self.normaliser = shape.heads, shape.head, feature, normaliser
        self.qk = linear(shape.width, 2 * shape.heads * feature)
        self.v = linear(shape.width, shape.width)
        self.out_gate = linear(shape.width, shape.width, bias=True)
        self.norm = nn.RMSNorm(shape.head, eps=shape.eps)
        self.out = linear(shape.width, shape.width)
        self.gate = None
        if normaliser:
            self.gate = nn.Sequential(linear(shape.width, rank), linear(rank, shape.heads * feature, bias=True))

    def start(self, batch: int, like: Tensor) -> State:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {"memory": like.new_zeros(batch, self.heads, self.feature, self.head, dtype=dtype)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k = split_heads(self.qk(x), 2 * self.heads).chunk(2, 2)
        v = split_heads(self.v(x), self.heads)
        decay = None
        if self.gate is not None:
            gate = split_heads(self.gate(x), self.heads)
            decay = functional.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32))) / self.normaliser
        memory = None if state is None else state["memory"]
        o, memory = recurrence(q * self.feature**-0.5, k, v, decay, memory)
        y = self.norm(o.to(x.dtype)).flatten(2) * functional.silu(self.out_gate(x))
        return self.out(y), None if state is None else {"memory": memory}


@claim("gated-linear")
class GatedLinearClaim(Claim):
    statement: ClassVar[str] = (
        "a gate that hangs on the token makes linear attention competitive with softmax attention in language "
        "modelling, and its perplexity stays where it was on texts several times longer than those it learned from"
    )
    setting: ClassVar[str] = (
        "bytes of text, passages of 128; 2 layers of width 64: gated, the same without the gate, and softmax with "
        "rotary positions; 3 seeds, 700 steps of 64 passages; then judged on passages of 1,024, too"
    )
    reads = False
    steps: int = 700
    seeds: tuple[int, ...] = (0, 1, 2)
    lengths: tuple[int, int] = (128, 1024)

    def run(self, bench: Bench) -> Finding:
        short, long = (f"lm:length={n}" for n in self.lengths)
        mixers = {"gated": "gated-linear", "no gate": "gated-linear:normaliser=0", "softmax": "softmax"}
        models = {name: Sizes(mixer=text) for name, text in mixers.items()}
        found = by_seed(
            short,
            models,
            Settings(steps=self.steps, lr=3e-3),
            device=bench.model.device,
            seeds=self.seeds,
            progress=bench.progress,
        )
        losses = {name: [each.scores["loss"] for each in runs] for name, runs in found.items()}
        judge = TRAIN_TASKS.parse(long)
        far = {
            name: [judge.judge(each.model, count=64, batch=8)["loss"].value for each in runs]
            for name, runs in found.items()
        }
        grown = {name: over_seeds([b - a for a, b in zip(losses[name], far[name], strict=True)]) for name in mixers}
        gate = differences(found["gated"], found["no gate"], "loss")
        ratio = over_seeds([a / b for a, b in zip(losses["gated"], losses["softmax"], strict=True)])
        return Finding(
            {
                **{f"loss, {name}": over_seeds(values) for name, values in losses.items()},
                **{f"loss on longer passages, {name}": over_seeds(values) for name, values in far.items()},
                **{f"loss on longer less on those learned, {name}": each for name, each in grown.items()},
                "loss with the gate less without": gate,
                "loss over softmax's": ratio,
            },
            {
                "the gate helps": gate.high < 0,
                "the loss is at most 5% above softmax's": ratio.high < 1.05,
                "the loss is no higher on passages 8 times as long, by 0.05 nats at most": grown["gated"].high < 0.05,
                "on these it is lower than softmax's": over_seeds(
                    [a - b for a, b in zip(far["gated"], far["softmax"], strict=True)]
                ).high
                < 0,
            },
        )
