"""Linear attention: a sum of outer products in place of a cache."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.claims import Claim, Finding, claim
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.mixers.softmax import RECALL, recall_sizes, recall_task
from foveate.tasks.base import Bench
from foveate.train import Settings
from foveate.train.trial import by_seed, held_bytes, over_seeds


@mixer("linear")
class Linear(Mixer):
    """Linear attention with features elu(x) + 1, normalised by the sum of its weights.

    The recurrence with A = 1, k_t = phi(k), and a column of ones beside v that gives the sum.
    """

    paper = Paper(
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        2020,
        "https://arxiv.org/abs/2006.16236",
    )
    claim = "costs time linear in the length, and a state of fixed size that forgets beyond it"

    def build(self, shape: Shape) -> TokenMixer:
        return LinearMixer(shape)


class LinearMixer(TokenMixer):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.head = shape.heads, shape.head
        self.qkv = linear(shape.width, 3 * shape.width)
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {"memory": like.new_zeros(batch, self.heads, self.head, self.head + 1, dtype=dtype)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        q, k = (functional.elu(each) + 1 for each in (q, k))
        exact = torch.promote_types(x.dtype, torch.float32)  # the weights' sum is beyond float16 in long texts
        v = functional.pad(v.to(exact), (0, 1), value=1.0)
        total, memory = recurrence(q, k, v, None, None if state is None else state["memory"])
        y = (total[..., :-1] / total[..., -1:].clamp_min(1e-6)).to(x.dtype)
        return self.out(y.flatten(2)), None if state is None else {"memory": memory}


@claim("linear")
class LinearClaim(Claim):
    statement: ClassVar[str] = (
        "linear attention goes in time linear in the length with a state of fixed size, and recalls the less of what "
        "it holds the more that is (from Based, arXiv 2402.18668)"
    )
    setting: ClassVar[str] = (
        "2 layers of width 64, 2 heads, a convolution over 3 tokens; mqar with 4, 8 and 16 pairs in texts of 32, 64 "
        "and 128 tokens, vocab 128; at most 800 steps of 64, until 99.5% of validation answers are right; 3 seeds"
    )
    reads = False
    steps: int = 800
    seeds: tuple[int, ...] = (0, 1, 2)

    def run(self, bench: Bench) -> Finding:
        metrics, right, held = {}, [], []
        for number, pairs in enumerate(RECALL):
            found = by_seed(
                recall_task(pairs),
                {"linear": recall_sizes("linear")},
                Settings(steps=self.steps, lr=3e-3, until=0.995),
                device=bench.model.device,
                seeds=self.seeds,
                progress=lambda done, number=number: bench.progress((number + done) / len(RECALL)),  # type: ignore[misc]
            )["linear"]
            right.append(over_seeds([run.scores["accuracy"] for run in found]))
            held.append(held_bytes(found[0].model, 8 * pairs))
            metrics[f"right, {pairs} pairs"] = right[-1]
            metrics[f"bytes held, {pairs} pairs"] = Metric.exact(held[-1])
        return Finding(
            metrics,
            {
                "what is held does not grow with the text": len(set(held)) == 1,
                "fewer answers are right with 16 pairs than with 4": right[-1].high < right[0].low,
            },
        )
