"""Multi-head latent attention (DeepSeek-V2): a text is held as one small latent a token, and one rotary key."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, cached, linear, rotated, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.trial import by_seed, differences, held_bytes, over_seeds


@mixer("mla")
class Mla(Mixer):
    """Keys and values of all heads come from one latent of a token, c = norm(W_D x), of `latent` numbers:

        k_i = [W_UK,i c; rope(W_KR x)],   v_i = W_UV,i c,   q_i = [W_UQ,i z; rope(W_QR,i z)],   z = x or norm(W_DQ x)
        o_i = softmax(q_i k_i^T / sqrt(d + r)) v_i

    with d channels of a head and a rotary key of r channels that all heads share: a rotation between W_UQ and W_UK
    would depend on both positions, so positions have channels of their own. Held are c and the rotary key alone,
    `latent` + r numbers a token. Step by step the maps are absorbed: q_i meets W_UK,i first and then the latents
    themselves, and W_UV,i comes after the sum over tokens, so that no key or value of the past is made again.

    The paper's sizes are latent = 4 d and r = d / 2, and these are the defaults. Its scaling factors at the narrow
    places are not here.

    Fields:
        latent: numbers of the latent; 0: 4 times a head's.
        rotary: channels of the rotary key, even; 0: half a head's, rounded up to an even number.
        query_latent: numbers of the queries' latent, which saves memory in training only; 0: none.
    """

    paper = Paper(
        "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        2024,
        "https://arxiv.org/abs/2405.04434",
    )
    claim = "holds a small part of what multi-head attention does, and is better than it"
    grows = True

    latent: int = 0
    rotary: int = 0
    query_latent: int = 0

    def __post_init__(self) -> None:
        if min(self.latent, self.rotary, self.query_latent) < 0:
            raise FoveateError(f"{self}: latent, rotary and query_latent must be 0 or more.")
        if self.rotary % 2:
            raise FoveateError(f"{self}: a rotation turns pairs of channels: give an even number for rotary.")

    def build(self, shape: Shape) -> TokenMixer:
        rotary = self.rotary or 2 * math.ceil(shape.head / 4)
        return MlaMixer(shape, self.latent or 4 * shape.head, rotary, self.query_latent)


class MlaMixer(TokenMixer):
    """Args: the shape; numbers of the latent; channels of the rotary key; numbers of the queries' latent, or 0."""

    def __init__(self, shape: Shape, latent: int, rotary: int, query_latent: int):
        super().__init__()
        self.heads, self.head, self.latent, self.rotary = shape.heads, shape.head, latent, rotary
        self.down = linear(shape.width, latent + rotary)
        self.norm = nn.RMSNorm(latent, eps=shape.eps)
        self.up = linear(latent, shape.heads * 2 * shape.head)
        self.query_down = linear(shape.width, query_latent) if query_latent else None
        self.query_norm = nn.RMSNorm(query_latent, eps=shape.eps) if query_latent else None
        self.query_up = linear(query_latent or shape.width, shape.heads * (shape.head + rotary))
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        return {
            "latents": like.new_zeros(batch, 0, self.latent),
            "rotary": like.new_zeros(batch, 0, self.rotary),
            "seen": like.new_zeros(batch, dtype=torch.int64),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        at = 0 if state is None else state["seen"]
        z = x
        if self.query_down is not None and self.query_norm is not None:
            z = _normed(self.query_norm, self.query_down(x))
        q, turned = split_heads(self.query_up(z), self.heads).split([self.head, self.rotary], -1)
        turned = rotated(turned, at)
        c, key = self.down(x).split([self.latent, self.rotary], -1)
        c, key = _normed(self.norm, c), rotated(key.unsqueeze(2), at).squeeze(2)
        if state is not None:
            held, state = cached(state, latents=c, rotary=key)
            c, key = held["latents"], held["rotary"]
        y = self.absorbed(q, turned, c, key) if q.shape[1] == 1 else self.expanded(q, turned, c, key)
        return self.out(y.flatten(2)), state

    def expanded(self, q: Tensor, turned: Tensor, c: Tensor, key: Tensor) -> Tensor:
        """Attention with the keys and values of all tokens made: cheaper where there are many queries.

        Args:
            q, turned: (batch, n, heads, d) and (batch, n, heads, r), without and with rotation.
            c, key: (batch, held + n, latent) and (batch, held + n, r).

        Returns:
            (batch, n, heads, d).
        """
        k, v = split_heads(self.up(c), self.heads).chunk(2, -1)
        shared = key.unsqueeze(2).expand(-1, -1, self.heads, -1)
        return attend(torch.cat([q, turned], -1), torch.cat([k, shared], -1), v, scale=self.scale)

    def absorbed(self, q: Tensor, turned: Tensor, c: Tensor, key: Tensor) -> Tensor:
        """The same with the latents themselves as keys and values; see `expanded`."""
        up_k, up_v = self.up.weight.to(q.dtype).unflatten(0, (self.heads, 2, self.head)).unbind(1)
        q = torch.cat([torch.einsum("bnhd,hdl->bnhl", q, up_k), turned], -1)
        latents = attend(q, torch.cat([c, key], -1).unsqueeze(2), c.unsqueeze(2), scale=self.scale)
        return torch.einsum("bnhl,hdl->bnhd", latents, up_v)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head + self.rotary)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return norm(x.to(norm.weight.dtype)).to(x.dtype)  # under autocast x is in bfloat16, the weight is not


@claim("mla")
class LatentsBeatHeads(Claim):
    statement: ClassVar[str] = (
        "latent attention is better than multi-head attention though a text holds a small part of what it holds there "
        "(table 9), and so better than grouped-query attention that holds as little (table 8)"
    )
    setting: ClassVar[str] = (
        "two layers of width 128 with 8 heads, the next byte of prose and code in passages of 128: multi-head "
        "attention, latent attention with a latent of 56 numbers and a rotary key of 8, and grouped-query attention "
        "with 2 heads of keys and values, which is 64 numbers a token and layer as well, as it is and with a "
        "feed-forward layer larger by the weights that it has fewer; 3 seeds, 600 steps of 64 passages"
    )
    reads: ClassVar[bool] = False
    steps: int = 600
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 128
    task: str = "lm:length=128"

    def run(self, bench: Bench) -> Finding:
        head = self.width // 8
        sizes = Sizes(width=self.width, heads=8)
        ours = f"mla:latent={4 * head - head // 2},rotary={head // 2}"
        models = {
            "multi-head": sizes,
            "latent": replace(sizes, mixer=ours),
            "grouped": replace(sizes, mixer="softmax:kv_heads=2"),
            "grouped, larger": replace(sizes, mixer="softmax:kv_heads=2", channel="gated:times=3.13"),
        }
        found = by_seed(
            self.task,
            models,
            Settings(steps=self.steps, lr=3e-3),
            device=bench.model.device,  # type: ignore[arg-type]
            seeds=self.seeds,
            progress=bench.progress,
        )
        held = {name: held_bytes(got[0].model, 64) for name, got in found.items()}
        counts = {name: sum(p.numel() for p in got[0].model.parameters()) for name, got in found.items()}
        metrics = {f"loss, {name}": over_seeds([x.scores["loss"] for x in found[name]]) for name in found}
        checks = {}
        for name in ("multi-head", "grouped", "grouped, larger"):
            gap = metrics[f"loss, latent less {name}"] = differences(found["latent"], found[name], "loss")
            checks[f"latent attention is better than {name} attention"] = gap.high < 0
        counters = 8 * sizes.layers  # a layer counts the tokens that went by
        checks["a text holds a quarter of what it holds with multi-head attention"] = (
            4 * (held["latent"] - counters) == held["multi-head"] - counters
        )
        checks["and as much as with the grouped one"] = held["latent"] == held["grouped"] == held["grouped, larger"]
        checks["the grouped one that is larger, and multi-head attention, have as many weights, within 3%"] = all(
            abs(counts[name] / counts["latent"] - 1) < 0.03 for name in ("multi-head", "grouped, larger")
        )
        checks["absorbed and expanded, the numbers are the same"] = self.apart(found["latent"][0].model) < 1e-9
        return Finding(metrics, checks)

    def apart(self, model: nn.Module) -> float:
        """The largest difference between the two forms, in float64, for the last token of a random text."""
        module = model.layers[0].mixer  # type: ignore[union-attr, index]
        same = MlaMixer(Shape(self.width, 8), module.latent, module.rotary, 0).double()
        same.load_state_dict(module.state_dict())
        q, turned, c, key = (
            torch.randn(1, *sizes, dtype=torch.double)
            for sizes in ((1, 8, same.head), (1, 8, same.rotary), (20, same.latent), (20, same.rotary))
        )
        with torch.no_grad():
            return float((same.absorbed(q, turned, c, key) - same.expanded(q, turned, c, key)).abs().max())
