"""A mixture of experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Channel, ChannelMixer, Shape, channel
from foveate.backbone.parts import linear
from foveate.errors import FoveateError
from foveate.methods import Paper


@channel("moe")
class MoE(Channel):
    """p = softmax(W x); y = sum of w_e expert_e(x) over the `active` largest p_e, experts being gated MLPs; no token is
    dropped.

    The weights w are those p over their sum (Mixtral); with one active expert p itself, so that the router learns
    (Switch). Training adds `balance` * E * sum_e f_e P_e to the loss, f_e the fraction of choices that fell on expert e
    and P_e the mean of p_e (Switch Transformers, arXiv 2101.03961, equations 4 to 6; f over all `active` choices): it
    is `balance` where all experts are used alike, and more where they are not.

    Fields:
        experts: how many there are.
        active: how many work on a token.
        times: channels inside an expert, as a multiple of the width; rounded to a multiple of 8.
        balance: the weight of the balancing loss.
    """

    paper = Paper("Mixtral of Experts", 2024, "https://arxiv.org/abs/2401.04088")
    claim = "has the quality of more weights than work on any one token"

    experts: int = 8
    active: int = 2
    times: float = 1.33
    balance: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.experts:
            raise FoveateError(
                f"moe: {self.active} of {self.experts} experts can't work on a token: give active from 1 to the number "
                "of experts."
            )
        if self.times <= 0 or self.balance < 0:
            raise FoveateError(f"{self}: times must be above 0, balance 0 or more.")

    def build(self, shape: Shape) -> ChannelMixer:
        inner = max(8, 8 * round(self.times * shape.width / 8))
        return MoEMixer(shape, inner, self.experts, self.active, self.balance)


class MoEMixer(ChannelMixer):
    """Args: the shape; channels inside an expert; how many experts; how many work on a token; the balance's weight."""

    def __init__(self, shape: Shape, inner: int, experts: int, active: int, balance: float):
        super().__init__()
        self.experts, self.active, self.balance = experts, active, balance
        width = shape.width
        self.router = linear(width, experts)
        self.gate_up = nn.Parameter(torch.randn(experts, width, 2 * inner) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(experts, inner, width) / math.sqrt(inner))

    def writers(self) -> list[nn.Parameter]:
        """What writes into the residual stream; the backbone decides how small it starts."""
        return [self.down]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        logits = self.router(flat)
        p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = p.topk(self.active, -1)
        if self.active > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        loads = functional.one_hot(chosen.flatten(), self.experts).sum(0)
        self.extra_loss = self._imbalance(p, loads) if self.training else None
        y = self._worked(flat, chosen, loads).unflatten(0, chosen.shape)
        return (y * weights.unsqueeze(-1)).sum(1).to(x.dtype).view_as(x)

    def _imbalance(self, p: Tensor, loads: Tensor) -> Tensor:
        return self.balance * self.experts * (loads / loads.sum() * p.mean(0)).sum()

    @torch.compiler.disable  # its shapes hang on the choices
    def _worked(self, x: Tensor, chosen: Tensor, loads: Tensor) -> Tensor:
        """What the chosen experts make of each token, all experts at once: each has the places that the busiest needs.

        Args:
            x: (tokens, width).
            chosen: (tokens, active), experts.
            loads: (experts,), how many choices fell on each.

        Returns:
            (tokens * active, width).
        """
        expert = chosen.flatten()
        order = expert.argsort(stable=True)
        first = loads.cumsum(0) - loads
        place = torch.empty_like(expert)
        place[order] = torch.arange(len(expert), device=x.device) - first[expert[order]]
        held = x.new_zeros(self.experts, int(loads.max()), x.shape[-1])
        held[expert, place] = x.repeat_interleave(self.active, 0)
        gate, up = torch.bmm(held, self.gate_up.to(x.dtype)).chunk(2, -1)
        return torch.bmm(functional.silu(gate) * up, self.down.to(x.dtype))[expert, place]
