"""Verbatim: how well a model remembers a list of words, in their order, and which heads look back at it."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.claims import Claim, Finding, claim, random_others
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.attention import Call, replaced_attention
from foveate.models.patching import ablated
from foveate.probes.base import Data, Lines, Probe, Reading, clear_heads, counted, named, probe, quiet
from foveate.probes.watch import in_blocks
from foveate.tasks.base import Bench, passages
from foveate.tasks.copying import FIRST, NOUNS, SECOND, _listed, _permuted, written

LEAST = 0.3
"""Of a head's attention, on the average: from here on its role is called clear."""
KINDS = ("the same list", "in another order", "other words")


@probe("verbatim")
class Verbatim(Probe):
    """How much less a list of nouns surprises when it comes back, and which heads look at the word to come.

    The texts are those of the task `copy`: a list of nouns, a stretch of prose, and the list again, or in another
    order, or other nouns. What is measured is the mean surprisal of the second list's nouns over that of the first's,
    while the list's length, the prose between, and how often the list was read before vary, one at a time. Ours: a
    head's score "verbatim" is its attention, from the token before each token of a noun that comes back, to where that
    token stood the first time.

    Fields:
        cases: lists, each with its own nouns and prose.
        nouns: length of a list; a half and a quarter of it are tried, too.
        gap: tokens of prose between; an eighth of it and three times it are tried, too.
        times: how often the list is read before, at most.

    Source: Characterizing Verbatim Short-Term Memory in Neural Language Models (2022).

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> reading = Verbatim(cases=1, nouns=4, gap=16).measure(model, Data.of(model, fv.tiny_tokenizer()))
        >>> reading.roles, [panel.x for panel in reading.panels]
        ([], ['words in the list', 'tokens between', 'times read before'])
    """

    paper: ClassVar[Paper | None] = Paper(
        "Characterizing Verbatim Short-Term Memory in Neural Language Models", 2022, "https://arxiv.org/abs/2210.13569"
    )
    claim: ClassVar[str] = "transformers can call up the very words they have read, in their order, over long stretches"
    title: ClassVar[str] = "Does the model remember a list word for word?"

    cases: int = 4
    nouns: int = 10
    gap: int = 128
    times: int = 3

    def __post_init__(self) -> None:
        most = len(NOUNS) // 2
        if self.cases < 1 or self.gap < 8 or self.times < 1 or not 4 <= self.nouns <= most:
            raise FoveateError(f"{self}: cases and times must be at least 1, gap at least 8, and nouns 4 to {most}.")

    def check(self, model: PreTrainedModel, data: Data) -> None:
        room, longest = anatomy(model).max_positions, self.longest(data.tokenizer)
        if longest > room:
            raise FoveateError(
                f"{self}: the texts have up to {longest} tokens, more than the {room} positions of this model: give "
                "fewer nouns, a smaller gap, or fewer times."
            )
        self.prose(data, model)

    def longest(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of the longest text, at most."""
        read = max(self.times * (self._list(tokenizer) + self.gap), self._list(tokenizer) + 3 * self.gap)
        return read + self._list(tokenizer)

    def _list(self, tokenizer: PreTrainedTokenizerBase) -> int:
        lead = max(tokens(lead, tokenizer).shape[1] for lead in (FIRST, SECOND))
        return lead + self.nouns * (1 + max(tokens(f" {noun}", tokenizer).shape[1] for noun in NOUNS))

    def prose(self, data: Data, model: PreTrainedModel) -> list[Tensor]:
        """For each case, (1, token) on the model's device: as much prose as its longest text has."""
        length = self.gap * max(3, self.times)
        return list(
            tokens(data.text.calibration, data.tokenizer, self.cases * length).to(model.device).split(length, 1)
        )

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        each = self._list(data.tokenizer)
        settings = 5 + self.times
        return self.cases * (each * (5 + self.times + 3 * settings) + self.gap * (6.125 + self.times))

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        with quiet(model):
            return self._measure(model, data)

    def _measure(self, model: PreTrainedModel, data: Data) -> Reading:
        sizes = [max(2, self.nouns // 4), self.nouns // 2, self.nouns]
        gaps = [self.gap // 8, self.gap, 3 * self.gap]
        by_size: dict[int, list[list[float]]] = {size: [] for size in sizes}
        by_gap: dict[int, list[list[float]]] = {gap: [] for gap in gaps}
        by_times: dict[int, list[list[float]]] = {times + 1: [] for times in range(self.times)}
        texts = []
        for i, prose in enumerate(self.prose(data, model)):
            lists = Lists.drawn(self.nouns, data.seed * 1000 + i)
            ratios = lists.ratios(model, data.tokenizer, prose[:, : self.times * self.gap], self.gap)
            for times, row in enumerate(ratios):
                by_times[times + 1].append(row)
            by_size[self.nouns].append(ratios[0])
            by_gap[self.gap].append(ratios[0])
            for size in sizes[:-1]:
                by_size[size] += lists.first(size).ratios(model, data.tokenizer, prose[:, : self.gap], self.gap)
            for gap in (gaps[0], gaps[-1]):
                by_gap[gap] += lists.ratios(model, data.tokenizer, prose[:, :gap], gap)
            texts.append(lists.text(data.tokenizer, prose[:, : self.gap]))
            data.progress(0.9 * (i + 1) / self.cases)
        scores = looks_back(model, texts)
        data.progress(1.0)
        roles = clear_heads(
            scores,
            LEAST,
            "verbatim memory",
            lambda s: f"When a list of words comes back, {s:.0%} of its attention goes to the word that is next on it.",
        )
        base = [mean([row[k] for row in by_times[1]]) for k in range(3)]
        summary = (
            f"When a list of {self.nouns} words comes back after {self.gap} tokens, its words surprise the model "
            f"{base[0].value:.0%} as much as at first; in another order {base[1].value:.0%}, and other words "
            f"{base[2].value:.0%}. {counted(len(roles), 'head')} clearly "
            f"look{'s' if len(roles) == 1 else ''} back at the word to come" + (f" ({named(roles)})." if roles else ".")
        )
        panels = [
            Lines(title, x, "surprisal over the first list's", _curves(points))
            for title, x, points in (
                ("Memory by the length of the list", "words in the list", by_size),
                ("Memory by the text between", "tokens between", by_gap),
                ("Memory by how often the list was read", "times read before", by_times),
            )
        ]
        metrics = {f"surprisal over the first list's, {kind}": value for kind, value in zip(KINDS, base, strict=True)}
        setting = {"cases": self.cases, "nouns": self.nouns, "gap": self.gap, "text": data.text.name, "least": LEAST}
        return Reading("verbatim", Verbatim.title, summary, metrics, {"verbatim": scores}, roles, list(panels), setting)


def _curves(points: dict[int, list[list[float]]]) -> dict[str, list[tuple[float, float]]]:
    return {
        kind: [(float(x), sum(row[k] for row in rows) / len(rows)) for x, rows in sorted(points.items())]
        for k, kind in enumerate(KINDS)
    }


@dataclass(frozen=True)
class Lists:
    """A list of nouns, the same in an order in which none follows the one it followed, and other nouns."""

    nouns: list[str]
    permuted: list[str]
    novel: list[str]

    @classmethod
    def drawn(cls, count: int, seed: int) -> Lists:
        rng = random.Random(seed)
        drawn = rng.sample(NOUNS, 2 * count)
        return cls(drawn[:count], _permuted(drawn[:count], rng), drawn[count:])

    def first(self, count: int) -> Lists:
        """Lists of the first `count` nouns."""
        nouns = self.nouns[:count]
        return Lists(nouns, _permuted(nouns, random.Random(count)), self.novel[:count])

    def ratios(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prose: Tensor, gap: int
    ) -> list[list[float]]:
        """The surprisal of the same list, of the permuted one and of other nouns over that of the first list.

        A row for each piece of `gap` tokens of the prose, (1, token): the list was read before each of them.
        """
        rows, first, cache = [], 0.0, None
        for piece in prose.split(gap, 1):
            lead = FIRST if cache is None else SECOND
            nats, cache = _listed(model, tokenizer, lead, self.nouns, cache, piece)
            first = first or nats
            rows.append(
                [
                    _listed(model, tokenizer, SECOND, again, copy.deepcopy(cache))[0] / first
                    for again in (self.nouns, self.permuted, self.novel)
                ]
            )
        return rows

    def text(self, tokenizer: PreTrainedTokenizerBase, prose: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """List, prose, list: token ids (1, n); where the second list's nouns stand, (noun token,), and the first's."""
        first, scored = written(tokenizer, FIRST, self.nouns)
        second, again = written(tokenizer, SECOND, self.nouns)
        ids = torch.cat([first.to(prose.device), prose, second.to(prose.device)], dim=1)
        return ids, again.nonzero()[:, 0] + first.shape[1] + prose.shape[1], scored.nonzero()[:, 0]


@torch.no_grad()
def looks_back(model: PreTrainedModel, texts: list[tuple[Tensor, Tensor, Tensor]]) -> UnitScores:
    """Each head's attention from before each noun token that comes back to where it first stood, the mean over all."""
    parts = anatomy(model)
    sums = torch.zeros(len(parts.layers), parts.heads, dtype=torch.float64)
    for ids, second, first in texts:

        def show(layer: int, start: int, weights: Tensor, call: Call, asked: Any = (second - 1, first)) -> None:
            here = (asked[0] >= start) & (asked[0] < start + weights.shape[1])
            looked = weights[:, asked[0][here].to(weights.device) - start, asked[1][here].to(weights.device)]
            sums[layer] += looked.double().sum(-1).cpu()

        with replaced_attention(model, in_blocks(show), "verbatim"):
            model(ids, use_cache=False, logits_to_keep=1)
    return UnitScores("head", sums / sum(len(second) for _, second, _ in texts))


CASES, NEAR, FAR = 12, 128, 512


@claim("verbatim")
class WordForWord(Claim):
    statement: ClassVar[str] = (
        "transformers call up the nouns of a list and their order: a repeated list surprises far less than a permuted "
        "one, and that less than new nouns, whatever the text between, by learned attention: without "
        "it the memory is gone (abstract)"
    )
    setting: ClassVar[str] = (
        f"{CASES} lists of 10 nouns, {NEAR} or {FAR} tokens of prose between; the mean surprisal of the second list's "
        "nouns over that of the first's; then the 5% of heads that look most at the word to come, on other lists and "
        "other prose, set to zero, against three random sets of as many heads. The paper scrambles all attention; its "
        "LSTM is left out: one that trains in a minute forgets for lack of training"
    )

    def run(self, bench: Bench) -> Finding:
        model, tokenizer, parts = bench.model, bench.tokenizer, anatomy(bench.model)
        own = Verbatim(cases=6, gap=NEAR)
        data = Data(tokenizer, bench.text, seed=1)
        chosen = [
            Lists.drawn(own.nouns, 1000 + i).text(tokenizer, prose[:, :NEAR])
            for i, prose in enumerate(own.prose(data, model))
        ]
        scores = looks_back(model, chosen).scores.flatten()
        count = max(1, round(0.05 * scores.numel()))
        best = scores.argsort(descending=True)[:count].tolist()
        sets = [best, *(random_others(scores.numel(), count, best, seed) for seed in range(3))]
        lists = [Lists.drawn(10, 2000 + i) for i in range(CASES)]
        texts = passages(bench, CASES, FAR)
        near, far = [], []
        for i, (each, prose) in enumerate(zip(lists, texts, strict=True)):
            near += each.ratios(model, tokenizer, prose[:, :NEAR], NEAR)
            far += each.ratios(model, tokenizer, prose, FAR)
            bench.progress(0.5 * (i + 1) / CASES)
        without: list[list[float]] = []
        for turn, heads in enumerate(sets):
            with ablated(model, [divmod(int(head), parts.heads) for head in heads]):
                rows = [
                    each.ratios(model, tokenizer, prose[:, :NEAR], NEAR)[0]
                    for each, prose in zip(lists, texts, strict=True)
                ]
            without.append([row[0] for row in rows])
            bench.progress(0.5 + 0.5 * (turn + 1) / len(sets))
        lost = [mean([1 - (1 - b) / (1 - a[0]) for a, b in zip(near, rows, strict=True)]) for rows in without]
        metrics: dict[str, Metric] = {}
        for gap, found in ((NEAR, near), (FAR, far)):
            metrics |= {
                f"{kind}, {gap} tokens between": mean([row[k] for row in found]) for k, kind in enumerate(KINDS)
            }
        metrics |= {
            f"the same list without the {count} heads that look back": mean(without[0]),
            **{f"the same list without {count} random heads, set {i + 1}": mean(r) for i, r in enumerate(without[1:])},
            "of what memory saves, lost without the heads that look back": lost[0],
            **{f"of what memory saves, lost without random heads, set {i + 1}": r for i, r in enumerate(lost[1:])},
        }
        return Finding(
            metrics,
            {
                "order matters: the same list surprises less than half as much as in another order": mean(
                    [row[0] / row[1] for row in near]
                ).high
                < 0.5,
                "identity matters: in another order, less than new words": mean([r[2] - r[1] for r in near]).low > 0,
                f"after {FAR} tokens the same list still surprises less than half as much as new words": mean(
                    [row[0] / row[2] for row in far]
                ).high
                < 0.5,
                "without the heads that look back more than half of it is lost": lost[0].low > 0.5,
                "without as many random heads it stays, in all three sets": all(r.high < 0.25 for r in lost[1:]),
            },
        )
