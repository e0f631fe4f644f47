"""Mamba: a state space model that chooses, token by token, what to keep."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import ShortConv, linear
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.kernels.selective_scan import selective_scan, selective_scan_by_steps
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import by_seed, differences, held_bytes, over_seeds


@mixer("mamba")
class Mamba(Mixer):
    """A selective state space model in a gated block (section 3).

    With u = silu(conv(W_u x)), of `expand` times the width, each channel by itself has `state` numbers h:

        h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t,   y_t = C_t' h_t + D u_t,   out = W_out (y * silu(W_z x)),

    where dt = softplus(W_dt (W_r u) + bias), B = W_B u and C = W_C u are made of the token, A < 0 and D are learned. A
    large dt takes the token in and forgets the rest; a small one passes the token by. A starts as -1, -2, ..., -state
    (S4D-Real), and dt between 0.001 and 0.1.

    Fields:
        state: numbers a channel remembers (N).
        expand: inner channels, as a multiple of the width (E).
        conv: tokens of the causal convolution.
        rank: of the map that gives dt; 0: the width / 16, rounded up.
        selective: whether dt, B and C are made of the token; False: they are learned and the same at all times (S4D).
    """

    paper = Paper(
        "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, "https://arxiv.org/abs/2312.00752"
    )
    claim = "picks what to remember by what it reads, in linear time, with a state of fixed size"

    state: int = 16
    expand: float = 2.0
    conv: int = 4
    rank: int = 0
    selective: bool = True

    def __post_init__(self) -> None:
        if self.state < 1 or self.conv < 1 or self.expand <= 0 or self.rank < 0:
            raise FoveateError(f"{self}: state and conv must be 1 or more, expand above 0, and rank 0 or more.")

    def build(self, shape: Shape) -> TokenMixer:
        return MambaMixer(shape, self)


class MambaMixer(TokenMixer):
    """Args: the shape, and the settings."""

    def __init__(self, shape: Shape, settings: Mamba):
        super().__init__()
        self.states, self.selective = settings.state, settings.selective
        inner = max(1, round(settings.expand * shape.width))
        self.rank = settings.rank or math.ceil(shape.width / 16)
        self.inner_gate = linear(shape.width, 2 * inner)
        self.conv = ShortConv(inner, settings.conv)
        self.log_rates = nn.Parameter(torch.arange(1.0, self.states + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        # dt begins log-uniform in [0.001, 0.1]: the bias is softplus's inverse of it.
        first = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)))
        self.step_bias = nn.Parameter(first + torch.log(-torch.expm1(-first)))
        if self.selective:
            self.chosen = linear(inner, self.rank + 2 * self.states)
            self.step = linear(self.rank, inner)
        else:
            self.b = nn.Parameter(torch.ones(inner, self.states))
            self.c = nn.Parameter(torch.randn(inner, self.states) / math.sqrt(self.states))
        self.out = linear(inner, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        memory = like.new_zeros(batch, *self.log_rates.shape, dtype=torch.promote_types(like.dtype, torch.float32))
        return {"memory": memory, "last": self.conv.start(batch, like)["conv"]}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        u, gate = self.inner_gate(x).chunk(2, -1)
        u, conv = self.conv(u, None if state is None else {"conv": state["last"]})
        u = functional.silu(u)
        exact = torch.promote_types(u.dtype, torch.float32)
        bias = self.step_bias.to(exact)
        if self.selective:
            small, b, c = self.chosen(u).split([self.rank, self.states, self.states], -1)
            step = functional.softplus(self.step(small).to(exact) + bias)
        else:
            b, c, step = self.b, self.c, functional.softplus(bias).expand(u.shape)
        before = None if state is None else state["memory"]
        y, memory = selective_scan(u, step, -self.log_rates.to(exact).exp(), b, c, before)
        y = (y + self.skip * u).to(u.dtype) * functional.silu(gate)
        return self.out(y), None if conv is None else {"memory": memory, "last": conv["conv"]}


@claim("mamba")
class MambaSelects(Claim):
    statement: ClassVar[str] = (
        "making step, B and C depend on the token lets a state space model solve selective copying and induction, "
        "which one that is the same at all times can't, and carry on at lengths far beyond training (section 4.1)"
    )
    setting: ClassVar[str] = (
        "two layers of width 64 without channel mixers, selective against time-invariant, 3 seeds: selective copying "
        "of 8 tokens among 64, and induction in 32 tokens, judged at 32 and at 128 too; 700 steps of 128 texts each; "
        "the scan against its definition in float64, and the bytes held after 64 and after 512 tokens"
    )
    reads: ClassVar[bool] = False
    steps: int = 700
    batch: int = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64, channel="no-channel")
    copying: str = "selective-copying:items=8,length=64"
    induction: str = "induction:length=32"
    longer: str = "induction:length=128"

    def run(self, bench: Bench) -> Finding:
        models = {
            "selective": replace(self.sizes, mixer="mamba"),
            "time-invariant": replace(self.sizes, mixer="mamba:selective=false"),
        }
        settings = Settings(steps=self.steps, batch=self.batch, lr=3e-3)
        copied, induced = (
            by_seed(
                task,
                models,
                settings,
                device=bench.model.device,
                seeds=self.seeds,
                progress=lambda part, i=i: bench.progress((i + part) / 2),  # type: ignore[misc]
            )
            for i, task in enumerate((self.copying, self.induction))
        )
        metrics: dict[str, Metric] = {}
        for name in models:
            metrics[f"selective copying, accuracy, {name}"] = over_seeds([x.scores["accuracy"] for x in copied[name]])
            metrics[f"induction, accuracy, {name}"] = over_seeds([x.scores["accuracy"] for x in induced[name]])
        judge = TRAIN_TASKS.parse(self.longer)
        far = over_seeds([judge.judge(x.model)["accuracy"].value for x in induced["selective"]])
        copying = differences(copied["selective"], copied["time-invariant"], "accuracy")
        induction = differences(induced["selective"], induced["time-invariant"], "accuracy")
        held = [held_bytes(copied["selective"][0].model, tokens) for tokens in (64, 512)]
        metrics |= {
            "induction at 4 times the length, accuracy, selective": far,
            "selective copying, selective less time-invariant": copying,
            "induction, selective less time-invariant": induction,
            "bytes held of a text": Metric.exact(held[0]),
        }
        near = metrics["induction, accuracy, selective"]
        return Finding(
            metrics,
            {
                "selection helps selective copying": copying.low > 0,
                "selection helps induction": induction.low > 0,
                "induction holds at 4 times the length (9 tenths of the accuracy at least)": (
                    far.value >= 0.9 * near.value
                ),
                "the scan is the recurrence": _scan_is_exact(),
                "the state does not grow with the text": held[0] == held[1],
            },
        )


def _scan_is_exact() -> bool:
    draw = torch.Generator().manual_seed(0)
    u, b, c = (torch.randn(2, 100, size, generator=draw, dtype=torch.double) for size in (6, 4, 4))
    step = torch.rand(2, 100, 6, generator=draw, dtype=torch.double)
    rates = -torch.rand(6, 4, generator=draw, dtype=torch.double)
    fast, slow = (scan(u, step, rates, b, c) for scan in (selective_scan, selective_scan_by_steps))
    return all(torch.allclose(x, y, atol=1e-10) for x, y in zip(fast, slow, strict=True))
