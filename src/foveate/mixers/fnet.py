"""FNet: a Fourier transform in place of attention."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import median
from foveate.measure.clock import alternated, timed
from foveate.methods import Paper
from foveate.mixers.softmax import Softmax
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.trial import by_seed, over_seeds


@mixer("fnet")
class FNet(Mixer):
    """y = W Re(F_tokens F_channels x): Fourier transforms over channels and over the text; the real part stays.

    Every token sees every other, also those after it; nothing is learned but W. Ours: the map W, and transforms that
    keep norms.
    """

    paper = Paper("FNet: Mixing Tokens with Fourier Transforms", 2021, "https://arxiv.org/abs/2105.03824")
    claim = "mixes tokens without weights, at most of attention's accuracy and less time"
    causal: ClassVar[bool] = False

    def build(self, shape: Shape) -> TokenMixer:
        return FNetMixer(shape)


class FNetMixer(TokenMixer):
    def __init__(self, shape: Shape):
        super().__init__()
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        raise FoveateError("fnet sees the whole text at once and can't go step by step: give it whole texts.")

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.out(torch.fft.fft2(exact, norm="ortho").real.to(x.dtype)), None


@claim("fnet")
class FNetClaim(Claim):
    statement: ClassVar[str] = (
        "a Fourier transform reaches nine tenths of attention's accuracy in less time on long texts"
    )
    setting: ClassVar[str] = (
        "ListOps with texts of 64 tokens; 2 layers of width 64, 3 seeds, 400 steps of 64 texts each, against (causal) "
        "softmax attention; and forward and backward of a layer in texts of 4,096 tokens"
    )
    reads = False
    steps: int = 400
    batch: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64)
    length: int = 4096

    def run(self, bench: Bench) -> Finding:
        mixers: dict[str, Mixer] = {"fnet": FNet(), "attention": Softmax()}
        found = by_seed(
            "listops",
            {name: replace(self.sizes, mixer=str(each)) for name, each in mixers.items()},
            Settings(steps=self.steps, batch=self.batch, lr=2e-3),
            device=bench.model.device,
            seeds=self.seeds,
            progress=bench.progress,
        )
        scores = {name: [x.scores["accuracy"] for x in found[name]] for name in mixers}
        share = over_seeds([a / max(b, 1e-9) for a, b in zip(scores["fnet"], scores["attention"], strict=True)])
        shape, device = Shape(self.sizes.width, self.sizes.heads), bench.model.device
        x = torch.randn(4, self.length, shape.width, device=device)
        layers = [each.build(shape).to(device) for each in mixers.values()]
        sides = [lambda layer=layer: timed(lambda: layer(x)[0].sum().backward(), device)[0] for layer in layers]
        alternated(sides, 1)
        ours, theirs = alternated(sides, 7)
        time = median([a / b for a, b in zip(ours, theirs, strict=True)])
        return Finding(
            {
                **{f"accuracy, {name}": over_seeds(each) for name, each in scores.items()},
                "accuracy over attention's": share,
                "time over attention's": time,
            },
            {
                "it has nine tenths of attention's accuracy": share.low > 0.9,
                "it takes less time in long texts": time.high < 1,
            },
        )
