"""Hybrid stacks: a few attention layers, spread evenly among layers that hold a state."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from foveate.backbone import Mixer, Shape, TokenMixer, mixer
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.mixers.mamba2 import Mamba2
from foveate.mixers.softmax import Softmax
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.trial import by_seed, differences, held_bytes, over_seeds


@mixer("hybrid")
class Hybrid(Mixer):
    """Mamba-2-Hybrid (section 4): of all layers a `share` has attention, the others a state.

    Of n layers, a = max(1, round(share n)) have attention, but never all, and before the i-th of these stand
    ceil(i (n - a) / (a + 1)) layers with a state: the runs between are as equal as can be, and the first layer has a
    state, which tells where a token stands, so that attention needs no positions. The paper has 4 of 28, a seventh,
    spread evenly; how that is rounded is ours. Layers have a channel mixer each, as in the paper half of all are MLPs.

    Fields:
        state: the mixer of the layers with a state.
        attention: the mixer of the others.
        share: of the layers, that have attention.
    """

    paper = Paper("An Empirical Study of Mamba-based Language Models", 2024, "https://arxiv.org/abs/2406.07887")
    claim = "recalls like attention with most of its layers, and so of its cache, replaced by states of fixed size"
    grows = True

    state: Mixer = Mamba2()
    attention: Mixer = Softmax(positions="none")
    share: float = 0.14

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise FoveateError(f"{self}: share must be between 0 and 1, so that some layers have a state.")
        for part in (self.state, self.attention):
            if not part.causal:
                raise FoveateError(f"{self}: {part} sees what comes after a token: give mixers that don't.")

    def build(self, shape: Shape) -> TokenMixer:
        chosen = self.attention if shape.layer in attention_layers(shape.layers, self.share) else self.state
        return chosen.build(shape)


def attention_layers(layers: int, share: float) -> list[int]:
    """Which layers have attention.

    Example:
        >>> attention_layers(28, 4 / 28), attention_layers(2, 0.14)
        ([5, 11, 17, 23], [1])
    """
    count = max(1, min(layers - 1, round(share * layers)))
    return [math.ceil(i * (layers - count) / (count + 1)) + i - 1 for i in range(1, count + 1)]


@claim("hybrid")
class HybridRecalls(Claim):
    statement: ClassVar[str] = (
        "pure state space models lag behind Transformers where they have to look things up in their context; with a "
        "few attention layers among them they do it as well, are no worse at text, and hold far less (sections 3 and 4)"
    )
    setting: ClassVar[str] = (
        "three layers of width 64: Mamba-2 with states of 16 rows, the same with attention in one layer, and attention "
        "in all; recall of 16 pairs in 64 tokens, 700 steps of 128 texts, and 128 bytes of text, 250 steps of 32, "
        "3 seeds each; bytes held of a text of 1,024 tokens"
    )
    reads: ClassVar[bool] = False
    steps: int = 700
    text_steps: int = 250
    batch: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64, layers=3)
    recall: str = "mqar:pairs=16,length=64,vocab=128"
    text: str = "lm:length=128"
    held: int = 1024

    def run(self, bench: Bench) -> Finding:
        models = {
            "Mamba-2": replace(self.sizes, mixer="mamba2:state=16"),
            "hybrid": replace(self.sizes, mixer="hybrid:state=mamba2(state=16)"),
            "attention": replace(self.sizes, mixer="softmax"),
        }
        recalled, read = (
            by_seed(
                task,
                models,
                Settings(steps=steps, batch=batch, lr=3e-3),
                device=bench.model.device,
                seeds=self.seeds,
                progress=lambda part, i=i: bench.progress((i + part) / 2),  # type: ignore[misc]
            )
            for i, (task, steps, batch) in enumerate(
                ((self.recall, self.steps, 4 * self.batch), (self.text, self.text_steps, self.batch))
            )
        )
        metrics: dict[str, Metric] = {}
        for name in models:
            metrics[f"recall, accuracy, {name}"] = over_seeds([x.scores["accuracy"] for x in recalled[name]])
            metrics[f"text, nats a byte, {name}"] = over_seeds([x.scores["loss"] for x in read[name]])
        bytes_held = {name: held_bytes(read[name][0].model, self.held) for name in models}
        lag = differences(recalled["attention"], recalled["Mamba-2"], "accuracy")
        gain = differences(recalled["hybrid"], recalled["Mamba-2"], "accuracy")
        short = differences(recalled["attention"], recalled["hybrid"], "accuracy")
        worse = differences(read["hybrid"], read["attention"], "loss")
        metrics |= {
            "recall, attention less Mamba-2": lag,
            "recall, hybrid less Mamba-2": gain,
            "recall, attention less hybrid": short,
            "text, nats a byte, hybrid less attention": worse,
            **{f"bytes held of {self.held} tokens, {name}": Metric.exact(held) for name, held in bytes_held.items()},
        }
        return Finding(
            metrics,
            {
                "the pure state space model recalls less than attention": lag.low > 0,
                "the hybrid recalls more than the pure state space model": gain.low > 0,
                "the hybrid recalls no less than attention, by 2 points at most": short.high < 0.02,
                "the hybrid's text is no worse than attention's, by 0.05 nats at most": worse.high < 0.05,
                "the hybrid holds less than half of what attention holds": (
                    2 * bytes_held["hybrid"] < bytes_held["attention"]
                ),
            },
        )
