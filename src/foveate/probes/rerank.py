"""Rerank: documents in the order of the attention that a query pays them."""

from __future__ import annotations

import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from foveate.claims import Claim, Finding, claim
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores, function
from foveate.models.anatomy import anatomy
from foveate.models.attention import Call, replaced_attention, weights_of
from foveate.models.load import tokenizer_for
from foveate.probes.watch import in_blocks
from foveate.tasks.base import Bench

LEAD = "Some passages are given here:"
ASKING = "\n\nWhich of these passages helps with the query?\n\nQuery:"
NOTHING = "N/A"
"""The query without content, by which attention is calibrated."""
OUTLYING = 2.0
"""Tokens this many standard deviations below the mean of their document's are left out."""


@dataclass(frozen=True)
class Ranking:
    """Documents in order.

    Attributes:
        order: indices of the documents, the best first.
        scores: of each document, as they were given.
        passes: forwards of the model.
        seconds: how long it took.
    """

    order: list[int]
    scores: list[float]
    passes: int
    seconds: float


@function(
    "rerank",
    role="probe",
    paper=Paper(
        "Attention in Large Language Models Yields Efficient Zero-Shot Re-Rankers",
        2024,
        "https://arxiv.org/abs/2410.02642",
    ),
    claim="the attention of a query to documents ranks them, in two passes, better than without calibration",
)
def rerank(
    model: PreTrainedModel,
    query: str,
    documents: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibrate: bool = True,
    heads: UnitScores | None = None,
) -> Ranking:
    """Rank documents by the attention that a query's tokens pay them, without generating anything.

    All documents stand in one prompt, and the query after them. Each document token gets the attention that the query's
    tokens pay it on average, summed over all heads of all layers, less the same of a query without content, "N/A".
    Tokens more than two standard deviations below the mean of their document's are left out; what the others have is
    summed. The second pass reads only the new query: keys and values of the documents are kept. The prompt's words are
    ours, and only the query's own tokens look: the words before it are the same in both passes.

    Args:
        model: the model.
        query: what is looked for.
        documents: the texts, in any order; earlier ones tend to get other attention than later ones, which the
            calibration takes off.
        tokenizer: the model's; by default the one that `load` gave with it.
        calibrate: False: one pass, and raw attention.
        heads: a weight for each query head, such as a mask or a probe's scores; below zero counts as zero. None: all
            heads count the same.

    Raises:
        FoveateError: no documents, an empty one, or an empty query; a prompt longer than the model's positions; scores
            of something else than this model's heads.

    Example:
        >>> import foveate as fv
        >>> ranking = rerank(fv.tiny("llama"), "a cat", ["the cat sat", "rain fell"], tokenizer=fv.tiny_tokenizer())
        >>> sorted(ranking.order), ranking.passes
        ([0, 1], 2)
    """
    start = time.perf_counter()
    if not documents or any(not text.strip() for text in documents) or not query.strip():
        what = "an empty query" if not query.strip() else "an empty document" if documents else "no documents"
        raise FoveateError(f"rerank got {what}: give a query and at least one document, all of them with words.")
    queries = [query, NOTHING] if calibrate else [query]
    looked, spans = attended(model, tokenizer or tokenizer_for(model), documents, queries, heads)
    scores = (calibrated(looked[0], looked[1], spans) if calibrate else raw(looked[0], spans)).tolist()
    order = sorted(range(len(documents)), key=lambda i: -scores[i])  # stable: of equal ones the first given goes first
    return Ranking(order, scores, len(queries), time.perf_counter() - start)


@torch.no_grad()
def attended(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    queries: Sequence[str],
    heads: UnitScores | None = None,
) -> tuple[Tensor, list[slice]]:
    """What each of several queries pays each token before it: float64 (query, token); and where documents stand.

    The documents are read with the first query; of all attention only sums are kept, layer by layer.
    """
    parts = anatomy(model)
    pieces = [LEAD, *(f"\n\n[{i + 1}] {text.strip()}" for i, text in enumerate(documents)), ASKING]
    cut = [tokens(piece, tokenizer) for piece in pieces]
    asked = [tokens(f" {query.strip()}", tokenizer) for query in queries]
    ends = torch.tensor([piece.shape[1] for piece in cut]).cumsum(0).tolist()
    spans = [slice(ends[i], ends[i + 1]) for i in range(len(documents))]
    before, longest = ends[-1], ends[-1] + max(ids.shape[1] for ids in asked)
    if longest > parts.max_positions:
        raise FoveateError(
            f"rerank: {len(documents)} documents and the query make {longest} tokens, and this model has "
            f"{parts.max_positions} positions: give fewer or shorter documents."
        )
    weight = torch.ones(len(parts.layers), parts.heads, dtype=torch.float64)
    if heads is not None:
        if heads.scores.shape != weight.shape:
            raise FoveateError(
                f"rerank: heads are {heads.kind} scores of the shape {tuple(heads.scores.shape)}, and this model has "
                f"{len(parts.layers)} layers of {parts.heads} heads: give a weight for each."
            )
        weight = heads.scores.double().cpu().nan_to_num(0.0).clamp_min(0)
    looked = torch.zeros(len(queries), before, dtype=torch.float64)

    def note(which: int, layer: int, rows: Tensor) -> None:
        """Rows: the attention (head, query, entry) of some of this query's tokens."""
        paid = torch.einsum("h,hqe->e", weight[layer].to(rows), rows[..., :before])
        looked[which] += paid.double().cpu() / asked[which].shape[1]

    # A cache that knows nothing of the layers' own windows keeps every entry.
    cache: Any = DynamicCache()
    training = model.training
    model.eval()
    try:
        for which, ids in enumerate(asked):

            def show(layer: int, start: int, weights: Tensor, call: Call, which: int = which) -> None:
                first = max(0, before - start)  # of the block's queries, the first that is of the query
                if first < weights.shape[1]:
                    note(which, layer, weights[:, first:])

            def attention(call: Call, which: int = which, show: Any = show) -> Tensor:
                if which == 0:
                    return in_blocks(show)(call)
                weights = weights_of(call)
                note(which, call.layer, weights[0].flatten(0, 1))
                return (weights.to(call.value.dtype) @ call.value[:, :, None]).flatten(1, 2)

            new = torch.cat([*cut, ids], dim=1) if which == 0 else ids
            with replaced_attention(model, attention, "rerank"):
                parts.base(new.to(model.device), past_key_values=cache, use_cache=True)
            for layer in cache.layers:  # the next query comes right after the documents
                layer.keys, layer.values = layer.keys[:, :, :before], layer.values[:, :, :before]
    finally:
        model.train(training)
    return looked, spans


def raw(looked: Tensor, spans: Sequence[slice]) -> Tensor:
    """The attention that each document gets."""
    return torch.stack([looked[span].sum() for span in spans])


def calibrated(looked: Tensor, blank: Tensor, spans: Sequence[slice]) -> Tensor:
    """What each document gets more than under the query without content, without outlying tokens.

    Example:
        >>> calibrated(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]), [slice(0, 2), slice(2, 3)])
        tensor([2., 1.])
    """
    more = looked - blank
    kept = []
    for span in spans:
        each = more[span]
        # A token alone is its own mean: it stays.
        low = each.mean() - OUTLYING * each.std(correction=0)
        kept.append(each[each >= low].sum())
    return torch.stack(kept)


def bm25(query: str, documents: Sequence[str], k: float = 1.2, b: float = 0.75) -> list[float]:
    """The usual score by shared words (Okapi BM25), to compare with.

    Example:
        >>> bm25("a cat", ["the cat sat", "rain fell"])[1]
        0.0
    """
    bags = [Counter(_words(text)) for text in documents]
    lengths = [sum(bag.values()) for bag in bags]
    usual = sum(lengths) / len(bags)
    scores = [0.0] * len(bags)
    for word in set(_words(query)):
        having = sum(word in bag for bag in bags)
        rarity = math.log(1 + (len(bags) - having + 0.5) / (having + 0.5))
        for i, bag in enumerate(bags):
            scores[i] += rarity * bag[word] * (k + 1) / (bag[word] + k * (1 - b + b * lengths[i] / usual))
    return scores


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@dataclass(frozen=True)
class Search:
    """Documents, and for some of them two queries each: some of its words, and what follows on it."""

    documents: list[str]
    asked: list[tuple[int, str, str]]


def searches(
    text: str, cases: int, documents: int = 20, asked: int = 4, words: int = 24, seed: int = 0
) -> list[Search]:
    """Passages of a text, each the start of a paragraph, and queries of ten words.

    Raises:
        FoveateError: the text has too few long paragraphs.
    """
    paragraphs = [p.split() for p in text.split("\n\n")]
    long = [p for p in paragraphs if len(p) >= words + 10 and sum(w.isalpha() for w in p) > 0.6 * len(p)]
    if len(long) < documents:
        raise FoveateError(
            f"a search among {documents} paragraphs of {words + 10} words was asked for, and the text has {len(long)}: "
            "give a longer text."
        )
    rng, made = random.Random(0), []
    for _ in range(cases):
        drawn, queries = rng.sample(long, documents), []
        for right in rng.sample(range(documents), asked):
            some = " ".join(drawn[right][i] for i in sorted(rng.sample(range(words), 10)))
            queries.append((right, some, " ".join(drawn[right][words : words + 10])))
        made.append(Search([" ".join(p[:words]) for p in drawn], queries))
    return made


def _gain(scores: Sequence[float], right: int) -> float:
    """nDCG where one document is right; it goes last among those of equal score."""
    return 1 / math.log2(1 + sum(score >= scores[right] for score in scores))


CASES = 12
"""Sets of passages in the claim."""


@claim("rerank")
class AttentionRanks(Claim):
    statement: ClassVar[str] = (
        "attention, calibrated by a query without content, ranks documents better than uncalibrated attention and than "
        "the order that BM25 gives, in two passes, and always ranks all of them (abstract)"
    )
    setting: ClassVar[str] = (
        "12 sets of 20 passages, the first 24 words of paragraphs of the evaluation text; for 4 passages of each set "
        "two queries, ten of its words and the ten that follow on it; nDCG, averaged over a set, and how often the "
        "right one is first"
    )

    def run(self, bench: Bench) -> Finding:
        cases, chance = searches(bench.text.evaluation, CASES), random.Random(1)
        kinds = ("its words", "what follows")
        gains: dict[tuple[str, str], list[list[float]]] = {}
        for done, case in enumerate(cases):
            queries = [NOTHING, *(query for _, *two in case.asked for query in two)]
            looked, spans = attended(bench.model, bench.tokenizer, case.documents, queries)
            for i, query in enumerate(queries[1:], start=1):
                right, kind = case.asked[(i - 1) // 2][0], kinds[(i - 1) % 2]
                for who, scores in {
                    "calibrated": calibrated(looked[i], looked[0], spans).tolist(),
                    "uncalibrated": raw(looked[i], spans).tolist(),
                    "BM25": bm25(query, case.documents),
                    "random order": [chance.random() for _ in case.documents],
                }.items():
                    sets = gains.setdefault((who, kind), [[] for _ in cases])
                    sets[done].append(_gain(scores, right))
            bench.progress((done + 1) / (len(cases) + 1))
        metrics: dict[str, Metric] = {}
        for (who, kind), sets in gains.items():
            metrics[f"nDCG, {kind}: {who}"] = mean([_mean(each) for each in sets])
            metrics[f"first, {kind}: {who}"] = mean([_mean([float(gain == 1) for gain in each]) for each in sets])
        over: dict[str, Metric] = {}
        for who in ("uncalibrated", "BM25", "random order"):
            over[who] = mean(
                [
                    _mean([_mean(gains["calibrated", kind][i]) - _mean(gains[who, kind][i]) for kind in kinds])
                    for i in range(len(cases))
                ]
            )
            metrics[f"nDCG, calibrated over {who}"] = over[who]
        one = rerank(bench.model, cases[0].asked[0][1], cases[0].documents, tokenizer=bench.tokenizer)
        whole = sorted(one.order) == list(range(len(cases[0].documents)))
        metrics |= {"passes": Metric.exact(one.passes), "seconds of a ranking": Metric.exact(one.seconds)}
        return Finding(
            metrics,
            {
                "calibration helps": over["uncalibrated"].low > 0,
                "better than BM25": over["BM25"].low > 0,
                "better than a random order": over["random order"].low > 0,
                "two passes, and all documents are ranked": whole and one.passes == 2,
            },
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
