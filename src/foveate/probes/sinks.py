"""Sinks: heads that rest on the first token, and what makes it what it is."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.patching import Site
from foveate.probes.backcopy import Backcopy, Extremes, Models, Shape, extremes
from foveate.probes.base import Data, Lines, Marked, Panel, Reading, Rows, clear_heads, counted, named, probe
from foveate.probes.watch import Seen, Through, Watch, Watcher
from foveate.tasks.base import Bench

LEAST = 0.5
"""Of a head's attention, on the average: from here on it rests on the first token."""


@probe("sinks")
class Sinks(Watcher):
    """Which heads rest on the first token, and which tokens beyond it draw attention for no reason of their own?

    Four things are measured. "sink": the attention that a head gives to the first token, averaged over the queries
    after the first quarter of a passage. "value drain": the part by which the first token's value, in a head, falls
    short of the median norm of the others'. Residual peaks: the norm of the residual stream at the first token over the
    median of the others', layer by layer. And sinks beyond the first token: tokens of a passage's first half that, in
    some head, receive more than `alpha` times what they would if attention were even (their number is the score "later
    sinks").

    A head is said to rest on the first token where its score is at least a half, and at least a quarter in every
    passage: passages begin with different tokens, so that on random weights no head passes, however sharp it is.

    Sources: Active-Dormant Attention Heads (2024) for sinks, drains and peaks; for sinks beyond the first token,
    [Unveiling and Harnessing Hidden Attention Sinks](https://arxiv.org/abs/2406.15765) (2024), section 4. There the
    even share is one over the passage's length; here it is what even attention under the causal mask gives, which is
    more for early tokens, and the second half is left out, where few queries make a high mean. Both are ours.

    Fields:
        alpha: how many times the even share makes a token a sink.

    Example:
        >>> import foveate as fv
        >>> model = fv.planted()
        >>> Sinks().measure(model, Data.of(model, fv.tiny_tokenizer(), length=64, passages=2)).of_role("sink")
        [(1, 0)]
    """

    paper: ClassVar[Paper | None] = Paper(
        "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
        2024,
        "https://arxiv.org/abs/2410.13835",
    )
    claim: ClassVar[str] = (
        "attention sinks, drained values and residual peaks at the first token come together, even in tiny models"
    )
    title: ClassVar[str] = "Which heads rest on the first token?"
    default: ClassVar[bool] = True
    streams: ClassVar[tuple[str, ...]] = ("mine", "code")

    alpha: float = 5.0

    def __post_init__(self) -> None:
        if self.alpha <= 1:
            raise FoveateError(f"sinks: alpha={self.alpha} must be above 1: it is a multiple of the even share.")

    def watch(self, model: PreTrainedModel, data: Data) -> Watch:
        return _Watch(model, data, self.alpha)


class _Watch(Watch):
    def __init__(self, model: PreTrainedModel, data: Data, alpha: float):
        self.parts, self.tokenizer, self.alpha = anatomy(model), data.tokenizer, alpha
        self.layers, self.heads = len(self.parts.layers), self.parts.heads
        self.received = torch.zeros(0)  # of one passage: (layer, head, entry)
        self.first = torch.zeros(self.layers, self.heads)
        self.value = torch.zeros(self.layers, self.heads)
        self.found: dict[str, list[Tensor]] = {"sink": [], "value": [], "later": [], "peak": [], "at": [], "shown": []}
        self.tokens: Counter[int] = Counter()
        self.seen: Counter[int] = Counter()
        self.sample: Tensor | None = None

    def sites(self) -> list[Site]:
        return [Site("residual", layer) for layer in range(self.layers + 1)]

    def begin(self, ids: Tensor) -> None:
        self.received = torch.zeros(self.layers, self.heads, len(ids))
        self.first.zero_()

    def attention(self, seen: Seen) -> None:
        length, layer, end = len(seen.ids), seen.layer, seen.start + seen.weights.shape[1]
        if seen.start == 0:
            norms = seen.values.float().norm(dim=-1)
            ratio = _over_median(norms).cpu()
            self.value[layer] = ratio.repeat_interleave(self.heads // len(ratio))
        self.received[layer, :, :end] += seen.weights.sum(1).cpu()
        late = seen.weights[:, max(0, length // 4 - seen.start) :, 0]
        self.first[layer] += late.sum(1).cpu() / (length - length // 4)

    def through(self, passage: Through) -> None:
        length = len(passage.ids)
        queries = torch.arange(length, 0, -1)  # that can see an entry
        even = (1 / torch.arange(1.0, length + 1)).flip(0).cumsum(0).flip(0) / queries
        times = self.received / queries / even
        later = times > self.alpha
        later[..., 0] = later[..., length // 2 :] = False
        half = passage.ids[: length // 2].tolist()
        self.seen.update(half[1:])
        for position in later.nonzero()[:, 2].tolist():
            self.tokens[half[position]] += 1
        norms = [_over_median(passage.values[site].float().norm(dim=-1)[None])[0].cpu() for site in self.sites()]
        for name, value in (
            ("sink", self.first.clone()),
            ("value", self.value.clone()),
            ("later", later.sum(-1).float()),
            ("peak", torch.stack(norms)),
            ("at", later.sum((0, 1)).float()),
        ):
            self.found[name].append(value)
        if self.sample is None:
            self.sample = passage.ids[: length // 2].cpu()
            self.found["shown"].append(later.float().mean((0, 1))[: length // 2])

    def reading(self) -> Reading:
        found = {name: torch.stack(values) for name, values in self.found.items()}
        average = {name: values.double().mean(0) for name, values in found.items()}
        in_all = found["sink"].amin(0) >= LEAST / 2
        resting = (average["sink"] >= LEAST) & in_all
        scores = {
            "sink": UnitScores("head", average["sink"]),
            "value drain": UnitScores("head", 1 - average["value"]),
            "later sinks": UnitScores("head", average["later"]),
        }
        roles = clear_heads(
            UnitScores("head", average["sink"].masked_fill(~in_all, 0.0)),
            LEAST,
            "sink",
            lambda s: f"It rests on the first token, which receives {s:.0%} of its attention.",
        )
        peak, layer = (float(x) for x in average["peak"].max(0))
        with_later = (found["later"] > 0).float().mean((1, 2)).tolist()
        metrics = {
            "heads that rest on the first token": Metric.exact(float(resting.sum())),
            "attention of a head to the first token": mean(found["sink"].mean((1, 2)).tolist()),
            "highest norm of the residual stream at the first token, over the others' median": mean(
                found["peak"].amax(1).tolist()
            ),
            "heads with a sink beyond the first token": mean(with_later),
        }
        summary = f"{counted(int(resting.sum()), 'head')} of {resting.numel()} rest on the first token"
        summary += f" ({named(roles)})." if roles else "."
        if roles:
            small = found["value"][:, resting].median(1).values.tolist()
            drained = metrics["norm of its value in those heads, over the others' median"] = mean(small)
            summary += (
                f" There its value is {drained.value:.0%}"
                f" as large as other tokens', and its residual stream up to {peak:.3g} times as large."
            )
        setting = {"alpha": self.alpha, "least": LEAST, "least in each passage": LEAST / 2, "peak at layer": int(layer)}
        return Reading("sinks", Sinks.title, summary, metrics, scores, roles, self._panels(average), setting)

    def _panels(self, average: dict[str, Tensor]) -> list[Panel]:
        peaks = [(float(i), float(x)) for i, x in enumerate(average["peak"])]
        kinds = {"sink": "attention to the first token", "value": "norm of its value, over the others' median"}
        by_layer = {
            words: [(float(i), float(x)) for i, x in enumerate(average[name].mean(1))] for name, words in kinds.items()
        }
        places = [(float(i), float(x)) for i, x in enumerate(average["at"][: len(average["shown"])]) if i]
        rows = [
            [self.tokenizer.decode([token]), self.seen[token], round(count / self.seen[token], 2)]
            for token, count in self.tokens.most_common(12)
        ]
        panels: list[Panel] = [
            Lines("Residual stream at the first token", "layer", "norm over the others' median", {"residual": peaks}),
            Lines("The first token, by layer", "layer", "mean over its heads", by_layer),
            Lines("Where later sinks stand", "position", "heads in which it is one", {"later sinks": places}),
            Rows("Which tokens are later sinks", ["token", "times in the text", "heads for which it is one"], rows),
        ]
        if self.sample is not None and float(average["shown"].max()) > 0:
            words = [str(self.tokenizer.decode([i])) for i in self.sample.tolist()]
            weights = (average["shown"] / average["shown"].max()).tolist()
            panels.append(Marked("Later sinks in a passage, by the heads that have them", words, weights))
        return panels


def _over_median(norms: Tensor) -> Tensor:
    """The first token's over the median of the others': (row, token) to (row,); 1 where the others have none."""
    median = norms[:, 1:].median(-1).values
    return torch.where(median > 0, norms[:, 0] / median.clamp(min=1e-30), 1.0)


@claim("sinks")
class SinksArise(Claim):
    statement: ClassVar[str] = (
        "sinks, drained values and residual peaks at the first token arise in transformers of one to three layers "
        "trained on Bigram-Backcopy; with ReLU attention sinks do not arise, with gradient descent in Adam's place "
        "residual peaks do not (abstract); language models have all three"
    )
    setting: ClassVar[str] = (
        "Bigram-Backcopy of 64 characters of the text, 3 triggers, 32 tokens; models of width 32, one head a layer, "
        "trained for 1,000 batches of 32 from 3 seeds: one layer with softmax and with ReLU attention (Adam, 0.01), "
        "three layers with Adam (0.003) and with gradient descent (0.1, momentum 0.9); the paper trains width 256 for "
        "10,000 batches of 512. The model: 4 passages of 512 tokens of prose and of code"
    )

    steps: ClassVar[int] = 1000
    seeds: ClassVar[int] = 3
    shapes: ClassVar[dict[str, Shape]] = {
        "one layer": Shape(1, 32, lr=0.01),
        "one layer, ReLU": Shape(1, 32, relu=True, lr=0.01),
        "three layers": Shape(3, 32),
        "three layers, gradient descent": Shape(3, 32, sgd=True, lr=0.1),
    }

    def run(self, bench: Bench) -> Finding:
        toys = self.toys(bench)
        whole = Data(bench.tokenizer, bench.text, progress=lambda done: bench.progress(0.8 + 0.2 * done))
        metrics: dict[str, Metric] = {}
        found: dict[str, dict[str, Metric]] = {}
        for name, toy in toys.items():
            found[name] = {
                "attention to the first token where nothing is copied": mean(toy.sink.tolist()),
                "attention to the first token where something is copied": mean(toy.active.tolist()),
                "norm of its value over the others' median": mean(toy.drain.tolist()),
                "norm of its residual stream over the others' median": mean(toy.peak.tolist()),
                "loss over the least that is possible": mean(toy.above.tolist()),
            }
            metrics |= {f"{name}: {words}": metric for words, metric in found[name].items()}
        sink, active, drain, peak, above = (
            list(kind) for kind in zip(*(f.values() for f in found.values()), strict=True)
        )
        real = Sinks().measure(bench.model, whole).metrics
        metrics |= {f"the model: {words}": metric for words, metric in real.items()}
        even = sum(1 / (query + 1) for query in range(8, 32)) / 24  # of the tokens that `extremes` looks at
        value = real.get("norm of its value in those heads, over the others' median", Metric.exact(1.0))
        high = real["highest norm of the residual stream at the first token, over the others' median"]
        return Finding(
            metrics,
            {
                "all tiny models learn the task, to 0.1 nats": all(m.high < 0.1 for m in above),
                "with softmax, the first token receives five times its even share where nothing is copied": min(
                    sink[0].low, sink[2].low
                )
                > 5 * even,
                "and no more than its even share where something is": max(active[0].high, active[2].high) < even,
                "its value is smaller than others'": max(drain[0].high, drain[2].high) < 1,
                "with ReLU it receives no more than its even share": sink[1].high < even,
                "and with softmax its value is smaller than with ReLU": drain[0].high < drain[1].low,
                "with Adam three layers have a residual peak (twice the others' norm)": peak[2].low > 2,
                "with gradient descent it is smaller": peak[3].high < peak[2].low,
                "the model: some head rests on the first token": real["heads that rest on the first token"].value > 0,
                "the model: in these heads its value has less than half the norm of others": value.high < 0.5,
                "the model: its residual stream has a peak (twice the others' norm)": high.low > 2,
            },
        )

    def toys(self, bench: Bench) -> dict[str, Extremes]:
        task = Backcopy(bench.text.calibration)
        rows, fresh = task.draw(32768, 32, seed=1), task.draw(128, 32, seed=2)
        toys, work, done = {}, sum(shape.layers for shape in self.shapes.values()), 0
        for name, shape in self.shapes.items():
            seeds = list(range(10, 10 + self.seeds))  # the setting was chosen on others
            models = Models(shape, task.vocab, rows.shape[1], seeds, bench.model.device)

            def told(part: float, done: int = done, layers: int = shape.layers) -> None:
                bench.progress(0.8 * (done + part * layers) / work)

            models.train(rows, self.steps, 32, told)
            toys[name] = extremes(task, models, fresh)
            done += shape.layers
        return toys
