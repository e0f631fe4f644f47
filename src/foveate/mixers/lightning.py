"""Lightning attention: linear attention with a fixed decay a head, computed in tiles."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear, simple_rms_norm, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, median
from foveate.measure.clock import alternated, timed
from foveate.methods import Paper
from foveate.mixers.softmax import Softmax
from foveate.tasks.base import Bench


@mixer("lightning")
class Lightning(Mixer):
    """Causal linear attention with a fixed decay a head, in tiles: the same time a token at any length.

    o_t = sum over s <= t of lambda_h^(t - s) (q_t . k_s) v_s, with q, k, v = silu of linear maps. Within a tile of B
    tokens it is (Q K' * M) V with M_ts = lambda^(t - s); what came before the tile is Lambda Q KV with
    Lambda = diag(lambda^1 .. lambda^B); and after a tile KV becomes lambda^B KV + (lambda^B Lambda^-1 K)' V. So nothing
    is summed up token by token, forward or backward. (The recurrence of the backbone is that tiling, and on a GPU a
    kernel does it.) The sum is normalised (root mean square, over all heads) and multiplied by sigmoid(W x).

    lambda_h = exp(-2^(-strength (h + 1) / heads) (1 - layer / layers)), h from 0: the slopes that come with the
    authors' kernels, weaker in later layers. The paper tries its algorithm in TransNormerLLM (`transnormerllm`); the
    silu on values, the learned norm and the sigmoid gate are those of MiniMax-01, which uses it.

    Fields:
        strength: how far apart the heads' decays are: the last head's is 2^-strength.
    """

    paper = Paper(
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
        2024,
        "https://arxiv.org/abs/2401.04658",
    )
    claim = "takes the same time a token at any length"

    strength: float = 8.0

    def __post_init__(self) -> None:
        if self.strength <= 0:
            raise FoveateError(f"{self}: strength must be above 0, as decays of all heads are 2^-strength to 1.")

    def build(self, shape: Shape) -> TokenMixer:
        return LightningMixer(shape, self.strength)


class LightningMixer(TokenMixer):
    def __init__(self, shape: Shape, strength: float):
        super().__init__()
        self.heads, self.head, self.eps = shape.heads, shape.head, shape.eps
        self.qkv = linear(shape.width, 3 * shape.width)
        self.gate = linear(shape.width, shape.width)
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.out = linear(shape.width, shape.width)
        self.strength, self.later = strength, shape.layer / shape.layers

    def start(self, batch: int, like: Tensor) -> State:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {"memory": like.new_zeros(batch, self.heads, self.head, self.head, dtype=dtype)}

    def decay(self, like: Tensor) -> Tensor:
        """Logarithms of lambda, (heads,); not a buffer, which `.bfloat16()` would round."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        head = torch.arange(1, self.heads + 1, device=like.device, dtype=dtype)
        return -torch.exp2(head * (-self.strength / self.heads)) * (1 - self.later)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v = split_heads(functional.silu(self.qkv(x)), 3 * self.heads).chunk(3, 2)
        y, memory = recurrence(q, k, v, self.decay(x), None if state is None else state["memory"])
        y = simple_rms_norm(y.flatten(2), self.eps) * self.norm.to(y.dtype)
        y = self.out(torch.sigmoid(self.gate(x)) * y)
        return y, None if state is None else {"memory": memory}


@claim("lightning")
class LightningClaim(Claim):
    statement: ClassVar[str] = (
        "tiling lets causal linear attention train at a constant speed whatever the length, while softmax attention "
        "slows down; the numbers are those of plain masked linear attention"
    )
    setting: ClassVar[str] = (
        "forward and backward of a layer of width 256 with 4 heads, in alternation with softmax attention, on as many "
        "tokens at each length: on a GPU 32,768 (bfloat16) in texts of 1,024 to 32,768, on a CPU 4,096 in texts of 256 "
        "to 4,096; and outputs and gradients on 200 tokens in float64"
    )
    reads = False
    width: int = 256
    rounds: int = 7
    lengths: tuple[int, ...] = ()

    def run(self, bench: Bench) -> Finding:
        device = bench.model.device
        cuda = device.type == "cuda"
        lengths = self.lengths or ((1024, 4096, 32768) if cuda else (256, 1024, 4096))
        shape = Shape(self.width, 4)
        layers = {"lightning": Lightning().build(shape).to(device), "softmax": Softmax().build(shape).to(device)}
        sides = []
        for length in lengths:
            x = torch.randn(lengths[-1] // length, length, self.width, device=device)
            sides += [lambda layer=layer, x=x: _seconds(layer, x) for layer in layers.values()]
        alternated(sides, 1)  # kernels are compiled
        seconds = alternated(sides, self.rounds, bench.progress)
        grown: dict[str, Metric] = {}
        speeds: dict[str, Metric] = {}
        for i, name in enumerate(layers):
            own = seconds[i::2]
            grown[name] = median([b / a for a, b in zip(own[0], own[-1], strict=True)])
            speeds |= {
                f"tokens a second, {name}, texts of {length}": median([lengths[-1] / each for each in times])
                for length, times in zip(lengths, own, strict=True)
            }
        wrong = _apart(device)
        return Finding(
            {
                **{f"time a token, longest over shortest, {name}": each for name, each in grown.items()},
                **speeds,
                "largest difference from masked attention, outputs and gradients": Metric.exact(wrong),
            },
            {
                "outputs and gradients are those of masked linear attention, to 1e-9": wrong < 1e-9,
                "the time a token changes by less than a quarter": 0.75 < grown["lightning"].value < 1.25,
                "softmax attention's time a token grows by more": grown["softmax"].low > grown["lightning"].high,
            },
        )


def _seconds(layer: TokenMixer, x: Tensor) -> float:
    """Forward and backward."""

    def work() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            y, _ = layer(x)
        y.sum().backward()

    layer.zero_grad()
    return timed(work, x.device)[0]


def _apart(device: torch.device) -> float:
    """How far tiles are from (Q K' * M) V over all tokens at once, with gradients."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 200, 3, 8, dtype=torch.float64, generator=draw).to(device) for _ in range(3))
    decay = -(2.0 ** (-2.0 * torch.arange(1, 4, device=device, dtype=torch.float64)))
    inputs = [each.requires_grad_() for each in (q, k, v)]
    back = torch.arange(200, device=device)[:, None] - torch.arange(200, device=device)
    mask = (decay[:, None, None] * back).exp().tril()
    plain = torch.einsum("bnhf,bmhf,hnm,bmhe->bnhe", q, k, mask, v)
    tiled, _ = recurrence(q, k, v, decay)
    weigh = torch.randn(tiled.shape, dtype=torch.float64, generator=draw).to(device)
    found = [[y, *torch.autograd.grad((y * weigh).sum(), inputs)] for y in (plain, tiled)]
    return max(float((a - b).detach().abs().max()) for a, b in zip(*found, strict=True))
