"""Mamba-2: a selective state space model with one decay a head, which is masked attention in another order."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import ShortConv, linear, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.trial import by_seed, differences, over_seeds


@mixer("mamba2")
class Mamba2(Mixer):
    """State space duality (sections 5 to 7): Mamba with one number a head for A, so that matrix products do the work.

    With z, x, B, C, dt all made of the token at once, and (x, B, C) = silu(conv(x, B, C)), a head with values x of
    `expand` * width / heads channels has a memory S of `state` rows:

        a_t = exp(-exp(log A) dt_t),   S_t = a_t S_(t-1) + dt_t B_t x_t',   y_t = S_t' C_t + D x_t,
        out = W_out norm(y * silu(z)),   dt = softplus(dt + bias).

    That is causal linear attention with queries C, keys B and the mask L_ij = a_i ... a_(j+1): chunks of a text are
    worked on as attention, and only memories are handed on. B and C are shared by all heads (one group).

    Fields:
        state: rows of each head's memory (N).
        expand: inner channels, as a multiple of the width.
        conv: tokens of the causal convolution.
    """

    paper = Paper(
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
        2024,
        "https://arxiv.org/abs/2405.21060",
    )
    claim = "is masked attention and a recurrence at once, so that larger states, which recall more, cost little"

    state: int = 64
    expand: float = 2.0
    conv: int = 4

    def __post_init__(self) -> None:
        if self.state < 1 or self.conv < 1 or self.expand <= 0:
            raise FoveateError(f"{self}: state and conv must be 1 or more, and expand above 0.")

    def build(self, shape: Shape) -> TokenMixer:
        return Mamba2Mixer(shape, self)


class Mamba2Mixer(TokenMixer):
    """Args: the shape, and the settings."""

    def __init__(self, shape: Shape, settings: Mamba2):
        super().__init__()
        self.heads, self.states = shape.heads, settings.state
        self.inner = self.heads * max(1, round(settings.expand * shape.width / self.heads))
        self.all = linear(shape.width, 2 * self.inner + 2 * self.states + self.heads)
        self.conv = ShortConv(self.inner + 2 * self.states, settings.conv)
        self.log_rates = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        # dt begins log-uniform in [0.001, 0.1]: the bias is softplus's inverse of it.
        first = torch.exp(torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.step_bias = nn.Parameter(first + torch.log(-torch.expm1(-first)))
        self.skip = nn.Parameter(torch.ones(self.heads, 1))
        self.weight, self.eps = nn.Parameter(torch.ones(self.inner)), shape.eps  # of the norm
        self.out = linear(self.inner, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        size = batch, self.heads, self.states, self.inner // self.heads
        memory = like.new_zeros(size, dtype=torch.promote_types(like.dtype, torch.float32))
        return {"memory": memory, "last": self.conv.start(batch, like)["conv"]}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        mixed = self.inner + 2 * self.states
        gate, mixed_in, step = self.all(x).split([self.inner, mixed, self.heads], -1)
        mixed_in, conv = self.conv(mixed_in, None if state is None else {"conv": state["last"]})
        values, b, c = functional.silu(mixed_in).split([self.inner, self.states, self.states], -1)
        values = split_heads(values, self.heads)
        exact = torch.promote_types(x.dtype, torch.float32)
        step = functional.softplus(step.to(exact) + self.step_bias.to(exact))  # batch, n, heads
        b, c = (each.unsqueeze(2).expand(-1, -1, self.heads, -1) for each in (b, c))
        decay = -self.log_rates.to(exact).exp() * step
        before = None if state is None else state["memory"]
        y, memory = recurrence(c, b, step.unsqueeze(-1) * values, decay, before)
        y = (y + self.skip.to(exact) * values).flatten(2) * functional.silu(gate)
        y = functional.rms_norm(y, (self.inner,), self.weight.to(y.dtype), self.eps).to(x.dtype)
        return self.out(y), None if conv is None else {"memory": memory, "last": conv["conv"]}


@claim("mamba2")
class Mamba2RecallsMore(Claim):
    statement: ClassVar[str] = (
        "a state space model with one decay a head is masked attention; it recalls more than Mamba with as large a "
        "state, and more the larger its state is (sections 5 and 9.1)"
    )
    setting: ClassVar[str] = (
        "two layers of width 64 without channel mixers on recall of 16 pairs in 64 tokens: Mamba-2 with states of 16 "
        "and 64 rows and Mamba with 16, 3 seeds, 700 steps of 128 texts each; the recurrence against attention with "
        "the whole mask in float64"
    )
    reads: ClassVar[bool] = False
    steps: int = 700
    batch: int = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64, channel="no-channel")
    task: str = "mqar:pairs=16,length=64,vocab=128"

    def run(self, bench: Bench) -> Finding:
        models = {
            name: replace(self.sizes, mixer=text)
            for name, text in (
                ("Mamba-2 of 16", "mamba2:state=16"),
                ("Mamba-2 of 64", "mamba2:state=64"),
                ("Mamba of 16", "mamba:state=16"),
            )
        }
        found = by_seed(
            self.task,
            models,
            Settings(steps=self.steps, batch=self.batch, lr=3e-3),
            device=bench.model.device,
            seeds=self.seeds,
            progress=bench.progress,
        )
        metrics = {f"accuracy, {name}": over_seeds([x.scores["accuracy"] for x in found[name]]) for name in models}
        larger = differences(found["Mamba-2 of 64"], found["Mamba-2 of 16"], "accuracy")
        older = differences(found["Mamba-2 of 16"], found["Mamba of 16"], "accuracy")
        speeds = {name: [x.report.tokens_per_second for x in found[name]] for name in models}
        faster = [a / b for a, b in zip(speeds["Mamba-2 of 16"], speeds["Mamba of 16"], strict=True)]
        metrics |= {
            "accuracy, states of 64 less states of 16": larger,
            "accuracy, Mamba-2 less Mamba": older,
            "tokens a second in training, over Mamba's": over_seeds(faster),
        }
        return Finding(
            metrics,
            {
                "a larger state recalls more": larger.low > 0,
                "it recalls more than Mamba with as large a state": older.low > 0,
                "the recurrence is attention under the mask": _is_attention(),
            },
        )


def _is_attention() -> bool:
    draw = torch.Generator().manual_seed(0)
    c, b, x = (torch.randn(2, 150, 3, size, generator=draw, dtype=torch.double) for size in (8, 8, 5))
    decay = -torch.rand(2, 150, 3, generator=draw, dtype=torch.double)
    fall = decay.cumsum(1).transpose(1, 2)
    mask = (fall.unsqueeze(-1) - fall.unsqueeze(-2)).exp().tril()
    whole = torch.einsum("bihf,bjhf,bhij,bjhd->bihd", c, b, mask, x)
    return torch.allclose(recurrence(c, b, x, decay)[0], whole, atol=1e-10)
