"""Spread: how much of what differs between tokens attention lets through, and how alike they become as a text grows."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.data.text import Text
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.patching import Site
from foveate.probes.base import Data, Lines, Panel, Reading, probe
from foveate.probes.watch import Seen, Through, Watch, Watcher
from foveate.tasks.base import Bench

LENGTHS = (32, 64, 128, 256, 512)
"""Lengths of a text's beginning at which it is looked at, as far as the passages go."""


@probe("spread")
class Spread(Watcher):
    """Does attention make the tokens of a text all alike, the longer the text the more?

    Attention mixes tokens, so what all have in common stays, and what differs fades: a filter that lets low frequencies
    pass. The high-frequency gain of a head is the norm of what differs between the outputs of a text's tokens over the
    norm of what differs between their values (both less their mean over the tokens): 1 where a head hands values on as
    they are, near 0 where every token gets the same. How alike tokens are is the mean cosine of all pairs of their
    states in the residual stream, layer by layer, and of texts, that of the means of their states after the last layer.

    All is measured for the first 32, 64 ... 512 tokens of the same passages: under a causal mask these are the same
    numbers as for texts of that length. The paper bounds the gain of the attention matrix itself, by its largest
    singular value, for attention that looks both ways; measuring it on a head's values is ours.

    Scores: "high-frequency gain" of whole passages; 0 where a head has no values to mix.

    Source: Length-Induced Embedding Collapse in Transformer-based Models (2024).

    Example:
        >>> import foveate as fv
        >>> model = fv.planted()
        >>> reading = Spread().measure(model, Data.of(model, fv.tiny_tokenizer(), length=64, passages=2))
        >>> float(reading.scores["high-frequency gain"].scores[0, 1]) > 0.9     # it hands on the token before
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "Length-Induced Embedding Collapse in Transformer-based Models", 2024, "https://arxiv.org/abs/2410.24200"
    )
    claim: ClassVar[str] = "attention is a low-pass filter: the longer a text, the less of what differs gets through"
    title: ClassVar[str] = "Does attention make all tokens alike?"
    default: ClassVar[bool] = True
    streams: ClassVar[tuple[str, ...]] = ("mine",)

    def watch(self, model: PreTrainedModel, data: Data) -> Watch:
        return _Watch(model)


class _Watch(Watch):
    def __init__(self, model: PreTrainedModel):
        parts = anatomy(model)
        self.layers, self.heads = len(parts.layers), parts.heads
        self.ends: list[int] = []
        self.outputs: dict[int, list[Tensor]] = {}
        self.gains = torch.zeros(0)  # of one passage: (length, layer, head)
        self.gain: list[Tensor] = []
        self.cosine: list[Tensor] = []  # of each passage: (length, layer)
        self.means: list[Tensor] = []  # of each passage: (length, hidden)

    def sites(self) -> list[Site]:
        return [Site("residual", layer) for layer in range(self.layers + 1)]

    def begin(self, ids: Tensor) -> None:
        self.ends = [n for n in LENGTHS if n < len(ids)] + [len(ids)]
        self.gains = torch.zeros(len(self.ends), self.layers, self.heads)

    def attention(self, seen: Seen) -> None:
        length, end = len(seen.ids), seen.start + seen.weights.shape[1]
        if seen.start == 0:
            self.outputs[seen.layer] = []
        values = seen.values.to(seen.weights.dtype)
        group = self.heads // len(values)
        # What is the same for all tokens passes the filter as it is, so it may go first: sums are then more exact.
        values = values - values.mean(1, keepdim=True)
        mixed = seen.weights.unflatten(0, (-1, group)) @ values[:, None, :end]
        self.outputs[seen.layer].append(mixed.flatten(0, 1))
        if end == length:
            out = torch.cat(self.outputs.pop(seen.layer), 1)
            for i, n in enumerate(self.ends):
                into = _differing(values[:, :n]).repeat_interleave(group)
                gain = _differing(out[:, :n]) / into.clamp(min=1e-30)
                self.gains[i, seen.layer] = torch.where(into > 0, gain, 0.0).cpu()

    def through(self, passage: Through) -> None:
        cosine = torch.zeros(len(self.ends), self.layers + 1)
        for layer, site in enumerate(self.sites()):
            states = passage.values[site].float()
            units = torch.nn.functional.normalize(states, dim=-1).cumsum(0)
            for i, n in enumerate(self.ends):
                cosine[i, layer] = (units[n - 1].square().sum() - n) / (n * (n - 1))
        self.gain.append(self.gains.clone())
        self.cosine.append(cosine)
        self.means.append(torch.stack([states[:n].mean(0) for n in self.ends]).cpu())

    def reading(self) -> Reading:
        gain, cosine = torch.stack(self.gain), torch.stack(self.cosine)
        short, long = self.ends[0], self.ends[-1]
        texts = _alike(torch.stack(self.means)) if len(self.means) > 1 else None
        of_layer = gain.mean(3)  # (passage, length, layer)
        of_model = of_layer.mean(2)
        metrics: dict[str, Metric] = {}
        for i, n in dict.fromkeys(((0, short), (len(self.ends) - 1, long))):
            metrics[f"high-frequency gain of a head, {n} tokens"] = mean(of_model[:, i].tolist())
            metrics[f"cosine of tokens' states after the last layer, {n} tokens"] = mean(cosine[:, i, -1].tolist())
            if texts is not None:
                metrics[f"cosine of texts, {n} tokens"] = mean(texts[:, i].tolist())
        if short < long:
            metrics[f"high-frequency gain, {long} tokens over {short}"] = mean(
                (of_model[:, -1] / of_model[:, 0].clamp(min=1e-30)).tolist()
            )
            metrics[f"cosine of tokens, {long} tokens less {short}"] = mean(
                (cosine[:, -1, -1] - cosine[:, 0, -1]).tolist()
            )
            if texts is not None:
                metrics[f"cosine of texts, {long} tokens less {short}"] = mean((texts[:, -1] - texts[:, 0]).tolist())
        first, last = float(of_model[:, 0].mean()), float(of_model[:, -1].mean())
        alike = float(cosine[:, -1, -1].mean())
        summary = (
            f"Of what differs between tokens, a head lets {last:.0%} through on the average in texts of {long} tokens"
            + (f" and {first:.0%} in texts of {short}" if short < long else "")
            + f"; after the last layer, tokens of {long} are alike by a cosine of {alike:.2f}."
        )
        scores = {"high-frequency gain": UnitScores("head", gain[:, -1].double().mean(0))}
        panels = self._panels(of_layer.mean(0), cosine.mean(0), None if texts is None else texts.mean(0))
        return Reading("spread", Spread.title, summary, metrics, scores, [], panels, {"lengths": self.ends})

    def _panels(self, gain: Tensor, cosine: Tensor, texts: Tensor | None) -> list[Panel]:
        def over_lengths(values: Tensor, shown: list[int]) -> dict[str, list[tuple[float, float]]]:
            return {
                f"layer {layer}": [(float(n), float(values[i, layer])) for i, n in enumerate(self.ends)]
                for layer in shown
            }

        few = sorted({round(part * (self.layers - 1) / 3) for part in range(4)})
        alike = over_lengths(cosine, few)
        alike["after the last"] = [(float(n), float(cosine[i, -1])) for i, n in enumerate(self.ends)]
        if texts is not None:
            alike["whole texts"] = [(float(n), float(texts[i])) for i, n in enumerate(self.ends)]
        by_layer = {
            f"{n} tokens": [(float(layer), float(gain[i, layer])) for layer in range(self.layers)]
            for i, n in enumerate(self.ends)
        }
        return [
            Lines(
                "What differs between tokens and gets through a head",
                "tokens of the text",
                "gain",
                over_lengths(gain, few),
            ),
            Lines("The same, by layer", "layer", "gain, mean over its heads", by_layer),
            Lines("How alike tokens are, as a layer gets them", "tokens of the text", "mean cosine of pairs", alike),
        ]


def _differing(vectors: Tensor) -> Tensor:
    """The norm of what is left without the mean over tokens: (row, token, width) to (row,)."""
    return (vectors - vectors.mean(1, keepdim=True)).flatten(1).norm(dim=1)


def _alike(means: Tensor) -> Tensor:
    """Each text's mean cosine to the others, for each length: (text, length, width) to (text, length)."""
    units = torch.nn.functional.normalize(means.double(), dim=-1)
    return ((units * units.sum(0)).sum(-1) - 1) / (len(units) - 1)


@claim("spread")
class LongTextsCollapse(Claim):
    statement: ClassVar[str] = (
        "attention is a low-pass filter that filters the more the longer the text is; so tokens, and the embeddings of "
        "texts, become more alike with length (abstract)"
    )
    setting: ClassVar[str] = (
        "16 passages of 512 tokens of evaluation text, against their own first 32 tokens; texts by the mean of their "
        "states after the last layer; of the model, and of the same with weights drawn at random; a gain is the mean "
        "over all heads"
    )

    passages: ClassVar[int] = 16

    def run(self, bench: Bench) -> Finding:
        judged = Text("evaluation", bench.text.evaluation, bench.text.calibration)

        class Judged(Spread):
            streams: ClassVar[tuple[str, ...]] = ("evaluation",)

        data = Data(bench.tokenizer, judged, 512, self.passages, progress=lambda done: bench.progress(0.8 * done))
        found = Judged().measure(bench.model, data).metrics
        fewer = Data(bench.tokenizer, judged, 512, 4, progress=lambda done: bench.progress(0.8 + 0.2 * done))
        random = Judged().measure(_random(bench.model), fewer).metrics
        metrics = {**found, **{f"random weights: {name}": metric for name, metric in random.items()}}

        def of(metrics: dict[str, Metric], start: str) -> Metric:
            return next(
                m for name, m in metrics.items() if name.startswith(start) and (" over " in name or " less " in name)
            )

        return Finding(
            metrics,
            {
                "less of what differs gets through in longer texts": of(found, "high-frequency").high < 1,
                "and with random weights": of(random, "high-frequency").high < 1,
                "tokens are more alike in longer texts": of(found, "cosine of tokens").low > 0,
                "and texts are, if they are longer": of(found, "cosine of texts").low > 0,
            },
        )


def _random(model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture with weights drawn anew; the caller's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh: PreTrainedModel = type(model)(model.config)  # type: ignore[arg-type]
    return fresh.to(model.device, model.dtype).eval()  # type: ignore[arg-type, return-value]
