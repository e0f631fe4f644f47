"""TransNormerLLM's token mixer: gated linear attention with learned relative positions and a fixed decay."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer, state_bytes
from foveate.backbone.parts import linear, simple_rms_norm, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, median
from foveate.measure.clock import alternated, timed
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes
from foveate.train.trial import by_seed, differences, over_seeds


@mixer("transnormerllm")
class TransNormerLLM(Mixer):
    """Linear attention with exponential decay, linearized relative positions, a gate, and a norm in place of a sum.

    O = SimpleRMSNorm(sum over s <= t of lambda^(t - s) Re(q_t k_s e^(i theta (t - s))) v_s) * U, then a linear map,
    with q, k = silu(W x), v and U = W x. SimpleRMSNorm(x) = x / rms(x), over all heads, without weights.
    lambda = exp(-(decay h / heads) (1 - layer / layers)), h from 0: the first head forgets nothing, later layers less.
    theta is learned, one a channel, from 10000^(-2 i / width). The real part is a dot product of twice the features:
    (q cos(theta t), q sin(theta t)) with (k cos(theta s), k sin(theta s)).

    The state is KV_t = lambda KV_(t-1) + k_t v_t', never multiplied by lambda^-t, which would overflow.

    Fields:
        decay: how fast the last heads of the first layer forget; 0: no head does.
        positions: which layers have the relative positions: `first` (the paper's choice), `all`, or `none`.
    """

    paper = Paper("Scaling TransNormer to 175 Billion Parameters", 2023, "https://arxiv.org/abs/2307.14995")
    claim = "is better than softmax attention at a constant time a token"

    decay: float = 8.0
    positions: str = "first"

    def __post_init__(self) -> None:
        if self.decay < 0:
            raise FoveateError(f"{self}: decay must be 0 (nothing is forgotten) or more.")
        if self.positions not in ("first", "all", "none"):
            raise FoveateError(f"transnormerllm: there are no positions {self.positions!r}: give first, all or none.")

    def build(self, shape: Shape) -> TokenMixer:
        turned = self.positions == "all" or (self.positions == "first" and shape.layer == 0)
        return TransNormerLLMMixer(shape, self.decay, turned)


class TransNormerLLMMixer(TokenMixer):
    """Args: the shape; the decay's strength; whether queries and keys are turned by their positions."""

    def __init__(self, shape: Shape, decay: float, turned: bool):
        super().__init__()
        self.heads, self.head, self.eps = shape.heads, shape.head, shape.eps
        self.qkvu = linear(shape.width, 4 * shape.width)
        self.out = linear(shape.width, shape.width)
        self.shift = nn.Parameter(torch.zeros(shape.heads, shape.head)) if turned else None
        self.rate = decay * (1 - shape.layer / shape.layers)

    @property
    def theta(self) -> Tensor | None:
        """Angles a position, (heads, head). Their shift is learned: they would be rounded by `.bfloat16()`, and a far
        position multiplies that."""
        if self.shift is None:
            return None
        dtype = torch.promote_types(self.shift.dtype, torch.float32)
        i = torch.arange(self.shift.numel(), device=self.shift.device, dtype=dtype)
        return (10_000.0 ** (-2 * i / len(i))).view_as(self.shift) + self.shift.to(dtype)

    def start(self, batch: int, like: Tensor) -> State:
        dtype = torch.promote_types(like.dtype, torch.float32)
        feature = self.head if self.shift is None else 2 * self.head
        memory = like.new_zeros(batch, self.heads, feature, self.head, dtype=dtype)
        return (
            {"memory": memory}
            if self.shift is None
            else {"memory": memory, "seen": like.new_zeros(batch, dtype=torch.long)}
        )

    def decay(self, like: Tensor) -> Tensor | None:
        """Logarithms of lambda, (heads,); not a buffer, which `.bfloat16()` would round."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        head = torch.arange(self.heads, device=like.device, dtype=dtype)
        return head * (-self.rate / self.heads) if self.rate else None

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v, u = self.qkvu(x).chunk(4, -1)
        q, k, v = (split_heads(each, self.heads) for each in (functional.silu(q), functional.silu(k), v))
        theta = self.theta
        if theta is not None:
            cos, sin = _turns(theta, x.shape[1], None if state is None else state["seen"])
            q, k = (torch.cat([each * cos, each * sin], -1).to(v.dtype) for each in (q, k))
        y, memory = recurrence(q, k, v, self.decay(x), None if state is None else state["memory"])
        y = self.out(simple_rms_norm(y.flatten(2), self.eps) * u)
        if state is None:
            return y, None
        seen = {"seen": state["seen"] + x.shape[1]} if "seen" in state else {}
        return y, {"memory": memory, **seen}


def _turns(theta: Tensor, n: int, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of theta times the position, (batch or 1, n, heads, head)."""
    dtype = torch.promote_types(theta.dtype, torch.float32)
    at = torch.arange(n, device=theta.device, dtype=dtype).unsqueeze(0)
    if seen is not None:
        at = at + seen.to(dtype).unsqueeze(1)
    angles = at[..., None, None] * theta.to(dtype)
    return angles.cos(), angles.sin()


@claim("transnormerllm")
class TransNormerLLMClaim(Claim):
    statement: ClassVar[str] = (
        "it beats softmax attention as a language model at equal tokens, the decay being part of why, and decodes at a "
        "constant time a token, with a recurrence that stays stable"
    )
    setting: ClassVar[str] = (
        "2 layers of width 64 learn the bytes of prose and code, 128 at a time, for 800 steps of 64 texts, with 3 "
        "seeds: transnormerllm, the same without decay, and softmax attention with a larger channel mixer, so that all "
        "have as many parameters within 2%; decoding after 256 and after 4,096 tokens; and a layer with every "
        "position turned, as a whole and step by step over 1,500 tokens"
    )
    reads = False
    steps: int = 800
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 64
    long: int = 4096
    rounds: int = 15
    stepped: int = 1500

    def run(self, bench: Bench) -> Finding:
        device = bench.model.device
        models = {
            "transnormerllm": Sizes(width=self.width, mixer="transnormerllm"),
            "without decay": Sizes(width=self.width, mixer="transnormerllm:decay=0"),
            "softmax": Sizes(width=self.width, mixer="softmax", channel="gated:times=3"),
        }
        found = by_seed(
            "lm",
            models,
            Settings(steps=self.steps, lr=2e-3),
            device=device,
            seeds=self.seeds,
            progress=lambda part: bench.progress(0.9 * part),
        )
        losses = {name: over_seeds([each.scores["loss"] for each in runs]) for name, runs in found.items()}
        gain = differences(found["transnormerllm"], found["softmax"], "loss")
        from_decay = differences(found["transnormerllm"], found["without decay"], "loss")
        layer = TransNormerLLM(positions="all").build(Shape(self.width, 4)).to(device)
        ratio, held = _decoding(layer, (self.long // 16, self.long), self.rounds)
        wrong = _forms(layer, self.stepped)
        bench.progress(1.0)
        return Finding(
            {
                **{f"loss, {name}": each for name, each in losses.items()},
                "loss less softmax attention's": gain,
                "loss less that without decay": from_decay,
                f"time of a step after {self.long} tokens over that after {self.long // 16}": ratio,
                "largest difference of whole and steps": Metric.exact(wrong),
            },
            {
                "the loss is below softmax attention's": gain.high < 0,
                "the decay lowers the loss": from_decay.high < 0,
                "a step takes as long after many tokens, within a fifth, and the state is as large": (
                    0.8 < ratio.value < 1.2 and held[0] == held[1]
                ),
                "whole and steps agree to 1e-3, where lambda^-t overflows": wrong < 1e-3,
            },
        )


@torch.no_grad()
def _decoding(layer: TokenMixer, lengths: tuple[int, int], rounds: int) -> tuple[Metric, list[int]]:
    """Time of a step after the longer text over that after the shorter one, and the states' bytes."""
    width, device = layer.out.in_features, layer.out.weight.device  # type: ignore[union-attr]
    states = []
    for length in lengths:
        x = torch.randn(1, length, width, device=device)  # type: ignore[arg-type]
        states.append(layer(x, layer.start(1, x))[1])
    one = torch.randn(1, 1, width, device=device)  # type: ignore[arg-type]

    def steps(state: State | None) -> float:
        def work() -> None:
            after = state
            for _ in range(10):
                _, after = layer(one, after)

        return timed(work, one.device)[0]

    times = alternated([lambda state=state: steps(state) for state in states], rounds)  # type: ignore[misc]
    ratio = median([b / a for a, b in zip(*times, strict=True)])
    return ratio, [state_bytes(state) for state in states]


@torch.no_grad()
def _forms(layer: TokenMixer, n: int) -> float:
    """How far a whole text and the same step by step are apart."""
    weight: Tensor = layer.out.weight  # type: ignore[union-attr, assignment]
    x = torch.randn(
        1, n, weight.shape[0], device=weight.device, generator=torch.Generator(weight.device).manual_seed(0)
    )
    whole, _ = layer(x)
    state, rows = layer.start(1, x), []
    for piece in x.split(1, 1):
        y, state = layer(piece, state)
        rows.append(y)
    return float((torch.cat(rows, 1) - whole).abs().max())
