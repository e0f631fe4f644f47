"""Softmax attention: multi-head, grouped-query, within a sliding window."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, cached, linear, rotated, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes
from foveate.train.trial import by_seed, held_bytes, over_seeds


@mixer("softmax")
class Softmax(Mixer):
    """Softmax attention over all tokens so far, with rotary positions.

    Fields:
        kv_heads: heads of keys and values, which share the query heads in equal groups; 0: as many as query heads.
        window: tokens that are seen at most, its own among them; 0: all.
        positions: `rope` or `none`.
    """

    paper = Paper("Attention Is All You Need", 2017, "https://arxiv.org/abs/1706.03762")
    claim = "recalls anything in its context, at a cost that grows with the context"
    grows = True

    kv_heads: int = 0
    window: int = 0
    positions: str = "rope"

    def __post_init__(self) -> None:
        if self.positions not in ("rope", "none"):
            raise FoveateError(f"softmax: there are no positions {self.positions!r}: give rope or none.")
        if self.window < 0 or self.kv_heads < 0:
            raise FoveateError(f"{self}: window and kv_heads must be 0 or more.")

    def build(self, shape: Shape) -> TokenMixer:
        return SoftmaxMixer(shape, self.kv_heads or shape.heads, self.window or None, self.positions == "rope")


class SoftmaxMixer(TokenMixer):
    """Args: the shape; heads of keys and values; tokens seen at most, or None; whether positions are rotary."""

    def __init__(self, shape: Shape, kv_heads: int, window: int | None, rope: bool):
        super().__init__()
        if shape.heads % kv_heads:
            raise FoveateError(
                f"softmax: {shape.heads} query heads can't share {kv_heads} KV heads: give a number that divides them."
            )
        if rope and shape.head % 2:
            raise FoveateError(
                f"softmax: rotary positions need heads of an even size, not {shape.head}: give positions=none, or "
                "another number of heads."
            )
        self.heads, self.kv_heads, self.window, self.rope, self.head = (
            shape.heads,
            kv_heads,
            window,
            rope,
            shape.head,
        )
        self.qkv = linear(shape.width, (shape.heads + 2 * kv_heads) * shape.head)
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        empty = like.new_zeros(batch, 0, self.kv_heads, self.head)
        return {"keys": empty, "values": empty, "seen": like.new_zeros(batch, dtype=torch.long)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        heads, kv_heads = self.heads, self.kv_heads
        q, k, v = split_heads(self.qkv(x), heads + 2 * kv_heads).split([heads, kv_heads, kv_heads], 2)
        if self.rope:
            at = 0 if state is None else state["seen"]
            q, k = rotated(q, at), rotated(k, at)
        if state is not None:
            held, state = cached(state, self.window and self.window - 1, keys=k, values=v)
            k, v = held["keys"], held["values"]
        return self.out(attend(q, k, v, window=self.window).flatten(2)), state


RECALL = (4, 8, 16)
"""Pairs of the recall tasks that claims of this file and of `linear` learn."""


def recall_task(pairs: int) -> str:
    return f"mqar:pairs={pairs},length={8 * pairs},vocab=128"


def recall_sizes(mixer: str) -> Sizes:
    return Sizes(mixer=mixer, width=64, layers=2, heads=2, conv=3)


@claim("softmax")
class SoftmaxClaim(Claim):
    statement: ClassVar[str] = (
        "attention solves associative recall whatever the number of pairs, with a cache that grows with the text "
        "(from Zoology, arXiv 2312.04927, and Based, arXiv 2402.18668)"
    )
    setting: ClassVar[str] = (
        "2 layers of width 64, 2 heads, a convolution over 3 tokens; mqar with 4, 8 and 16 pairs in texts of 32, 64 "
        "and 128 tokens, vocab 128; at most 1,000 steps of 64, until 99.5% of validation answers are right; 3 seeds; "
        "beside it, with 16 pairs, the same with a window of 16"
    )
    reads = False
    steps: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2)

    def run(self, bench: Bench) -> Finding:
        metrics, right = {}, {}
        for number, pairs in enumerate(RECALL):
            names = ("softmax", "softmax:window=16")[: 1 + (pairs == RECALL[-1])]
            models = {name: recall_sizes(name) for name in names}
            found = by_seed(
                recall_task(pairs),
                models,
                Settings(steps=self.steps, lr=3e-3, until=0.995),
                device=bench.model.device,
                seeds=self.seeds,
                progress=lambda done, number=number: bench.progress((number + done) / len(RECALL)),  # type: ignore[misc]
            )
            for name, runs in found.items():
                right[name, pairs] = over_seeds([run.scores["accuracy"] for run in runs])
                metrics[f"right, {name}, {pairs} pairs"] = right[name, pairs]
                held = held_bytes(runs[0].model, 8 * pairs)
                metrics[f"bytes held, {name}, {pairs} pairs"] = Metric.exact(held)
        first, last = (metrics[f"bytes held, softmax, {pairs} pairs"].value for pairs in (RECALL[0], RECALL[-1]))
        return Finding(
            metrics,
            {
                "all answers but 2% are right at every number of pairs": all(
                    right["softmax", pairs].value > 0.98 for pairs in RECALL
                ),
                "what is held grows with the text": last > 3.5 * first,
                "with a window of 16 tokens, fewer are right at 16 pairs": right["softmax:window=16", 16].high
                < right["softmax", 16].low,
            },
        )
