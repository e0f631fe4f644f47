"""Softmax attention: multi-head, grouped-query, within a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, cached, linear, rotated, split_heads
from foveate.errors import FoveateError
from foveate.methods import Paper


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
