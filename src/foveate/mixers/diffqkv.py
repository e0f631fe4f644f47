"""DiffQKV attention (Sigma): fewer and smaller keys than values, and more weights for queries, which are not held."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, cached, linear, rotated, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes, build
from foveate.train.loop import Settings
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import by_seed, differences, held_bytes, over_seeds


@mixer("diffqkv")
class DiffQkv(Mixer):
    """Softmax attention with different numbers of query, key and value heads, H, H_k and H_v:

        o_i = softmax(q_i K_a(i)^T / sqrt(d_k)) V_b(i),   a(i) = floor(i H_k / H),   b(i) = floor(i H_v / H)

    so that query heads share keys in groups of H / H_k and values in groups of H / H_v. A text holds
    H_k d_k + H_v d_v numbers a token. Augmented queries come from a hidden layer that is wider than they are,

        q = W_3 (silu(W_1 x) * W_2 x),

    which costs weights but nothing that is held. Positions are rotary.

    Ours: the paper calls the queries' hidden layer an intermediate dimension (1.5 times the width is its best) and
    compares it with a feed-forward layer that grows by as many channels at as many weights, but its text does not
    spell the layer out; we take the gated one of its feed-forward layers. Where its keys are smaller than its values, a
    learned map enlarges the keys that are held at each use; a linear map may as well stand at the queries, and so
    queries have the keys' size here. Its optional fetching of some values only is not here.

    Fields:
        key_heads, value_heads: heads of keys and of values, divisors of the heads; 0: as many as query heads.
        key_size: channels of a key head, even; 0: as many as of a value head.
        queries: the hidden layer of the queries, as a multiple of the width; 0: none, one linear map.
    """

    paper = Paper(
        "Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models",
        2025,
        "https://arxiv.org/abs/2501.13629",
    )
    claim = "can do with fewer keys than values, and makes up for what that costs with larger queries"
    grows = True

    key_heads: int = 1
    value_heads: int = 0
    key_size: int = 0
    queries: float = 1.5

    def __post_init__(self) -> None:
        if min(self.key_heads, self.value_heads, self.key_size, self.queries) < 0:
            raise FoveateError(f"{self}: key_heads, value_heads, key_size and queries must be 0 or more.")

    def build(self, shape: Shape) -> TokenMixer:
        for name in ("key_heads", "value_heads"):
            count = getattr(self, name) or shape.heads
            if shape.heads % count:
                raise FoveateError(
                    f"{self}: {shape.heads} query heads can't share {count} in equal groups: give {name} that divide "
                    "them."
                )
        if (self.key_size or shape.head) % 2:
            raise FoveateError(
                f"{self}: rotary positions need keys of an even size, not {self.key_size or shape.head}: give another "
                "key_size."
            )
        return DiffQkvMixer(shape, self)


class DiffQkvMixer(TokenMixer):
    """Args: the shape; the settings."""

    def __init__(self, shape: Shape, settings: DiffQkv):
        super().__init__()
        self.heads, self.head = shape.heads, shape.head
        self.key_heads, self.value_heads = settings.key_heads or shape.heads, settings.value_heads or shape.heads
        self.key_size = settings.key_size or shape.head
        hidden = round(settings.queries * shape.width)
        self.hidden = linear(shape.width, 2 * hidden) if hidden else None
        self.q = linear(hidden or shape.width, self.heads * self.key_size)
        if hidden:
            nn.init.normal_(self.q.weight, std=2 / hidden**0.5)  # silu and gate leave about half of the size
        self.k = linear(shape.width, self.key_heads * self.key_size)
        self.v = linear(shape.width, self.value_heads * self.head)
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        return {
            "keys": like.new_zeros(batch, 0, self.key_heads, self.key_size),
            "values": like.new_zeros(batch, 0, self.value_heads, self.head),
            "seen": like.new_zeros(batch, dtype=torch.int64),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        h = x
        if self.hidden is not None:
            gate, h = self.hidden(x).chunk(2, -1)
            h = functional.silu(gate) * h
        q, k, v = split_heads(self.q(h), self.heads), split_heads(self.k(x), self.key_heads), self.v(x)
        v = split_heads(v, self.value_heads)
        at = 0 if state is None else state["seen"]
        q, k = rotated(q, at), rotated(k, at)
        if state is not None:
            held, state = cached(state, keys=k, values=v)
            k, v = held["keys"], held["values"]
        if self.key_heads != self.value_heads:  # attention itself knows groups, but only the same of both
            k = k.repeat_interleave(self.heads // self.key_heads, 2)
            v = v.repeat_interleave(self.heads // self.value_heads, 2)
        return self.out(attend(q, k, v).flatten(2)), state


@claim("diffqkv")
class KeysNeedLessThanValues(Claim):
    statement: ClassVar[str] = (
        "a model loses less where it has fewer key heads than where it has as many fewer value heads; larger queries "
        "make it better, by more than a feed-forward layer that is larger by as many weights; and with a quarter of "
        "the key heads a text holds 37.5% less than with grouped-query attention (observations 1, 3 and 4, equation 2)"
    )
    setting: ClassVar[str] = (
        "two layers of width 64 with 8 heads, the next byte of prose and code in passages of 128: 8 heads of keys and "
        "values, 2 of keys, 2 of values, 2 of both, the latter with queries through a hidden layer of 1.5 times the "
        "width, and with a feed-forward layer larger by as many weights; 3 seeds, 400 steps of 64 passages"
    )
    reads: ClassVar[bool] = False
    steps: int = 400
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64, heads=8)
    task: str = "lm:length=128"

    def run(self, bench: Bench) -> Finding:
        def sizes(keys: int, values: int, queries: float = 0.0, channel: str = "gated") -> Sizes:
            mixer = f"diffqkv:key_heads={keys},value_heads={values},queries={queries}"
            return replace(self.sizes, mixer=mixer, channel=channel)

        # Three matrices of 1.5 widths in place of one: as many weights as 1.5 - 1/3 widths more in the gated channels.
        larger = f"gated:times={2.67 + 1.5 - 1 / 3:.3f}"
        models = {
            "8 heads of both": sizes(8, 8),
            "2 key heads": sizes(2, 8),
            "2 value heads": sizes(8, 2),
            "2 heads of both": sizes(2, 2),
            "2 heads of both, larger queries": sizes(2, 2, 1.5),
            "2 heads of both, larger feed-forward": sizes(2, 2, channel=larger),
        }
        found = by_seed(
            self.task,
            models,
            Settings(steps=self.steps, lr=3e-3),
            device=bench.model.device,  # type: ignore[arg-type]
            seeds=self.seeds,
            progress=bench.progress,
        )
        metrics = {f"loss, {name}": over_seeds([x.scores["loss"] for x in found[name]]) for name in found}
        pairs = {
            "2 key heads lose less than 2 value heads": ("2 key heads", "2 value heads"),
            "larger queries are better": ("2 heads of both, larger queries", "2 heads of both"),
            "larger queries are better than a larger feed-forward": (
                "2 heads of both, larger queries",
                "2 heads of both, larger feed-forward",
            ),
        }
        checks = {}
        for said, (ours, theirs) in pairs.items():
            gap = differences(found[ours], found[theirs], "loss")
            metrics[f"loss, {ours}, less {theirs}"] = gap
            checks[said] = gap.high < 0
        counts = {name: sum(p.numel() for p in got[0].model.parameters()) for name, got in found.items()}
        ratio = counts["2 heads of both, larger feed-forward"] / counts["2 heads of both, larger queries"]
        checks["both enlargements have as many weights, within 2%"] = abs(ratio - 1) < 0.02
        held = {name: held_bytes(got[0].model, 64) for name, got in found.items()}
        checks["larger queries hold no more"] = held["2 heads of both, larger queries"] == held["2 heads of both"]
        text, counters = TRAIN_TASKS.parse(self.task), 8 * self.sizes.layers  # a layer counts tokens in 8 bytes
        grouped, own = (held_bytes(build(text, sizes(keys, 4)), 64) - counters for keys in (4, 1))
        checks["a quarter of the key heads: a text holds 37.5% less than with grouped queries"] = 8 * own == 5 * grouped
        return Finding(metrics, checks)
