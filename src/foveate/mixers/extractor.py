"""Extractors: learned weights by distance, and a product with the token itself, in place of attention."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, median
from foveate.measure.clock import alternated, timed
from foveate.methods import Paper
from foveate.mixers.softmax import Softmax
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.trial import by_seed, differences, over_seeds

KINDS = ("she", "he", "we", "me")


@mixer("extractor")
class Extractor(Mixer):
    """An extraction, the sum of earlier tokens with a weight for each distance, times an adjustment by the token.

        e_t = (sum over i of W_i x_(t-i)) / sqrt(min(t, length)),   i = 0 .. length - 1
        y_t = W_out ((W_adj x_t) * e_t)

    So there are no products between pairs of tokens, and no softmax: e_t is a convolution. By kind:

        she  W_i a matrix for each distance
        he   W_i = diag(w_i) V, a vector for each distance and one matrix
        we   W_i = w_i V, a number for each distance and one matrix
        me   W_i = w_i, a number for each distance; W_adj is left out: the token itself adjusts

    The paper itself could not be read here. `she` is after its outline in public code (a matrix for each place, the
    sum, 1 / sqrt(t), the product with the adjusted token); that code follows a later paper too (arXiv 2311.12678), and
    which of the two divides by sqrt(t) could not be told. That weights go by distance, that there are `length` of them
    at most, W_out, and all of what `he`, `we` and `me` leave out are ours: the paper's abstract only says that they are
    simplified.

    Fields:
        kind: `she`, `he`, `we` or `me`.
        length: tokens that are seen, its own among them.
    """

    paper = Paper("Attention Is Not All You Need Anymore", 2023, "https://arxiv.org/abs/2308.07661")
    claim = "takes attention's place with weights by distance alone, at a lower loss"

    kind: str = "she"
    length: int = 32

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FoveateError(
                f"extractor: there is no kind {self.kind!r}: give {', '.join(KINDS[:-1])} or {KINDS[-1]}."
            )
        if self.length < 1:
            raise FoveateError(f"{self}: length must be at least 1, as a token sees itself.")

    def build(self, shape: Shape) -> TokenMixer:
        return ExtractorMixer(shape.width, self.kind, self.length)


class ExtractorMixer(TokenMixer):
    def __init__(self, width: int, kind: str, length: int):
        super().__init__()
        self.width, self.kind, self.length = width, kind, length
        # The last weight is that of the token itself. 1 / sqrt(t) is divided by in forward.
        rows, columns = {"she": (width, width), "he": (width, 1)}.get(kind, (1, 1))
        self.weight = nn.Parameter(torch.randn(rows, columns, length) / columns**0.5)
        self.value = linear(width, width) if kind in ("he", "we") else None
        self.adjust = linear(width, width) if kind != "me" else None
        self.out = linear(width, width)

    def start(self, batch: int, like: Tensor) -> State:
        return {
            "last": like.new_zeros(batch, self.length - 1, self.width),
            "seen": like.new_zeros(batch, dtype=torch.long),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        n = x.shape[1]
        v = x if self.value is None else self.value(x)
        if state is None:
            held = functional.pad(v, (0, 0, self.length - 1, 0))
        else:
            held = torch.cat([state["last"].to(v.dtype), v], 1)
        weight = self.weight.to(v.dtype)
        if self.kind == "she":
            extracted = functional.conv1d(held.mT, weight).mT
        else:
            extracted = functional.conv1d(held.mT, weight.expand(self.width, 1, -1), groups=self.width).mT
        at = torch.arange(1, n + 1, device=x.device)[None] + (0 if state is None else state["seen"][:, None])
        scale = at.clamp_max(self.length).to(torch.promote_types(x.dtype, torch.float32)).rsqrt().to(extracted.dtype)
        y = self.out((x if self.adjust is None else self.adjust(x)) * extracted * scale.unsqueeze(-1))
        if state is not None:
            state = {"last": held[:, n:].clone(), "seen": state["seen"] + n}
        return y, state


@claim("extractor")
class ExtractorClaim(Claim):
    statement: ClassVar[str] = (
        "the strongest extractor evidently beats self-attention, and the simpler ones come close to it or beat it, "
        "with less computation"
    )
    setting: ClassVar[str] = (
        "next bytes of passages of 64; 2 layers of width 64, 3 seeds, 400 steps of 64 passages each: softmax attention "
        "and extractors that see all 64 tokens (our reading of the kinds); and forward and backward of a layer of "
        "width 64 that sees whole texts of 128 and of 1,024 tokens"
    )
    reads = False
    steps: int = 400
    batch: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64)
    length: int = 64
    lengths: tuple[int, int] = (128, 1024)
    rounds: int = 5
    margin: float = 0.05

    def run(self, bench: Bench) -> Finding:
        mixers = {"attention": "softmax"} | {kind: f"extractor:kind={kind},length={self.length}" for kind in KINDS}
        found = by_seed(
            f"lm:length={self.length}",
            {name: replace(self.sizes, mixer=each) for name, each in mixers.items()},
            Settings(steps=self.steps, batch=self.batch, lr=2e-3),
            device=bench.model.device,
            seeds=self.seeds,
            progress=lambda done: bench.progress(0.9 * done),
        )
        above = {kind: differences(found[kind], found["attention"], "loss") for kind in KINDS}
        times = self.times(bench.model.device)
        return Finding(
            {
                **{f"loss, {name}": over_seeds([x.scores["loss"] for x in found[name]]) for name in mixers},
                **{f"loss, {kind} less attention": each for kind, each in above.items()},
                **{
                    f"parameters, {name}": Metric.exact(
                        float(sum(p.numel() for p in found[name][0].model.parameters()))
                    )
                    for name in mixers
                },
                **times,
            },
            {
                "she has a lower loss than attention": above["she"].high < 0,
                "he, we and me are no worse than attention, by 0.05 nats at most": all(
                    above[kind].high < self.margin for kind in KINDS[1:]
                ),
                "he, we and me take less time than attention in the longer texts": all(
                    times[f"time over attention's, {kind}, {self.lengths[-1]} tokens"].high < 1 for kind in KINDS[1:]
                ),
            },
        )

    def times(self, device: torch.device) -> dict[str, Metric]:
        """Time of forward and backward over attention's, by kind and length of text."""
        shape, found = Shape(self.sizes.width, self.sizes.heads), {}
        for length in self.lengths:
            x = torch.randn(max(1, 4096 // length), length, shape.width, device=device)
            mixers: list[Mixer] = [Softmax(), *(Extractor(kind=kind, length=length) for kind in KINDS)]
            layers = [each.build(shape).to(device) for each in mixers]
            sides = [lambda layer=layer, x=x: _seconds(layer, x) for layer in layers]
            alternated(sides, 1)
            own, *theirs = alternated(sides, self.rounds)
            for kind, seconds in zip(KINDS, theirs, strict=True):
                name = f"time over attention's, {kind}, {length} tokens"
                found[name] = median([b / a for a, b in zip(own, seconds, strict=True)])
        return found


def _seconds(layer: TokenMixer, x: Tensor) -> float:
    """Forward and backward."""
    return timed(lambda: layer(x)[0].sum().backward(), x.device)[0]
