"""Similar attention: layers that look at the same places as other layers do."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import mean, perplexity, perplexity_ratio
from foveate.measure.ranks import correlation
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.attention import Call, replaced_attention, weights_of
from foveate.probes.base import Data, Grid, Lines, Panel, Reading, Role, probe
from foveate.probes.watch import Seen, Through, Watch, Watcher
from foveate.scores.similarity import head_similarity, map_similarity
from foveate.tasks.base import Bench, passages, surprisal

LEAST = 0.9
"""Similarity to the layer before from which on a layer may be called an echo."""
BEYOND = 0.3
"""How far that has to be above the similarity of heads that have nothing to do with each other."""


@probe("similar-attention")
class SimilarAttention(Watcher):
    """How alike the attention of every two layers is: cosine of their weights, head by head and query by query.

    As `echo` measures it, but on some queries of each passage, spread evenly over it, so that no pass holds the whole
    attention of all layers. All attention looks alike to some degree: heads that look evenly, or rest on the first
    token, do so in any layer. So the similarity of each layer to the one before is told beside that of other heads of
    the same two layers (ours), and a layer is called an echo only where its heads are like just their counterparts.
    The score "own attention" is 1 - similarity to the layer before: the first layer has none.

    Fields: `queries`, looked at in each passage.

    Source: EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models (2024): its measure.

    Example:
        >>> import foveate as fv
        >>> model = fv.planted()
        >>> reading = SimilarAttention().measure(model, Data.of(model, fv.tiny_tokenizer(), length=64, passages=1))
        >>> [len(row) for row in reading.panels[0].values]
        [3, 3, 3]
    """

    paper: ClassVar[Paper | None] = Paper(
        "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
        2024,
        "https://arxiv.org/abs/2409.14595",
    )
    claim: ClassVar[str] = "many inner layers attend much alike, and those can share their attention at least cost"
    title: ClassVar[str] = "Which layers look at the same places?"
    default: ClassVar[bool] = True

    queries: int = 32

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise FoveateError(f"similar-attention: queries={self.queries} looks at none: give a number such as 32.")

    def watch(self, model: PreTrainedModel, data: Data) -> Watch:
        return _Watch(model, self.queries)


class _Watch(Watch):
    def __init__(self, model: PreTrainedModel, queries: int):
        self.layers, self.queries = len(anatomy(model).layers), queries
        self.rows: list[list[Tensor]] = [[] for _ in range(self.layers)]
        self.alike: list[Tensor] = []
        self.other: list[Tensor] = []

    def attention(self, seen: Seen) -> None:
        length = len(seen.ids)
        # From 1 on: the first token can only look at itself.
        places = torch.linspace(1, length - 1, min(self.queries, length - 1)).round().long()
        here = places[(places >= seen.start) & (places < seen.start + seen.weights.shape[1])] - seen.start
        rows = seen.weights[:, here.to(seen.weights.device)]
        self.rows[seen.layer].append(torch.nn.functional.pad(rows, (0, length - rows.shape[-1])))

    def through(self, passage: Through) -> None:
        maps = [torch.cat(rows, dim=1) if rows else None for rows in self.rows]
        self.rows = [[] for _ in range(self.layers)]
        other = torch.full((self.layers,), torch.nan, dtype=torch.float64)
        for at in range(1, self.layers):
            a, b = maps[at - 1], maps[at]
            if a is not None and b is not None and a.shape == b.shape and a.shape[0] > 1:
                pairs = head_similarity(a, b)
                other[at] = (pairs.sum() - pairs.trace()) / (pairs.numel() - len(pairs))
        self.alike.append(map_similarity(maps))
        self.other.append(other)

    def reading(self) -> Reading:
        alike, other = torch.stack(self.alike).mean(0), torch.stack(self.other).mean(0)
        before = torch.full((self.layers,), torch.nan, dtype=torch.float64)
        before[1:] = alike.diagonal(-1)
        clear = (before >= LEAST) & (before - other >= BEYOND)
        roles = [
            Role(
                "layer",
                at,
                0,
                "echo",
                float(before[at]),
                f"Its heads look where those of the layer before look: their weights are {before[at]:.0%} alike.",
            )
            for at in clear.nonzero().flatten().tolist()
        ]
        there = (~before.isnan()).nonzero().flatten().tolist()
        inner = [at for at in there if at < self.layers - 1]
        if inner:
            best = max(inner, key=lambda at: float(before[at]))
            summary = (
                f"Attention of a layer and of the one before is {float(before[there].mean()):.0%} alike on average, "
                f"and most so in layer {best} ({before[best]:.0%}). Heads of the same layers that are no counterparts "
                f"are {float(other[there].nanmean()):.0%} alike, so that much says nothing."
            )
        else:
            summary = "This model has no two inner layers whose attention could be compared."
        metrics = {}
        if there:
            metrics["alike to the layer before, mean"] = mean([float(s.diagonal(-1).nanmean()) for s in self.alike])
        if not other.isnan().all():
            metrics["heads that are no counterparts, mean"] = mean([float(o.nanmean()) for o in self.other])
        panels: list[Panel] = [
            Grid(
                "How alike the attention of two layers is",
                "layer",
                "layer",
                [[x if x == x else None for x in row] for row in alike.tolist()],
            ),
            Lines(
                "Likeness to the layer before",
                "layer",
                "cosine of attention weights",
                {
                    "the same heads": [(at, float(before[at])) for at in there],
                    "other heads": [(at, float(other[at])) for at in there if other[at] == other[at]],
                },
            ),
        ]
        scores = {"own attention": UnitScores("layer", (1 - before)[:, None])}
        setting = {"queries": self.queries, "least": LEAST, "beyond": BEYOND}
        name = "similar-attention"
        return Reading(name, SimilarAttention.title, summary, metrics, scores, roles, panels, setting)


# ---- the claim ------------------------------------------------------------------------------------------------------

TOKENS = 512
BLOCK = 64


@claim("similar-attention")
class SimilarityPredictsSharing(Claim):
    statement: ClassVar[str] = (
        "inner layers have highly similar attention, and where it is most similar, sharing it costs least (abstract "
        "and the analysis of similarity)"
    )
    setting: ClassVar[str] = (
        "similarity on 4 passages of 512 tokens of calibration text; each inner layer alone attends by the weights of "
        "the layer before, on 512 tokens of evaluation text, without training; control: the heads of the layer before "
        "in another order; intervals of the correlation resample layers"
    )

    def run(self, bench: Bench) -> Finding:
        model, count = bench.model, len(anatomy(bench.model).layers)
        found = SimilarAttention().measure(model, Data(bench.tokenizer, bench.text))
        own = found.scores["own attention"].scores[:, 0]
        inner = [at for at in range(1, count - 1) if own[at] == own[at]]
        if len(inner) < 4:
            raise FoveateError(
                f"only {len(inner)} of this model's layers could share the attention of the layer before, and the "
                "claim needs at least 4: take a deeper model."
            )
        ids = passages(bench, 1, min(TOKENS, anatomy(model).max_positions))[0]
        whole = shared_nll(model, ids, None)
        costs, moved = [], []
        for turn, at in enumerate(inner):
            costs.append(shared_nll(model, ids, at))
            moved.append(shared_nll(model, ids, at, shift=1))
            bench.progress((turn + 1) / len(inner))
        cost = torch.tensor([sum(each) - sum(whole) for each in costs]) / (len(whole) * BLOCK)
        other = torch.tensor([sum(each) - sum(whole) for each in moved]) / (len(whole) * BLOCK)
        alike = 1 - own[inner]
        predicts = correlation(alike, -cost)
        best = alike.argsort(descending=True)
        half = len(inner) // 2
        easy, hard = (mean(cost[part].tolist()) for part in (best[:half], best[half:]))
        gap = mean((other - cost).tolist())
        counts = [BLOCK] * len(whole)
        return Finding(
            {
                "perplexity, whole model": perplexity(whole, counts),
                "similarity to the layer before, inner layers": mean(alike.tolist()),
                "rank correlation of similarity and cheapness": predicts,
                "over whole: the most similar layer shares": perplexity_ratio(costs[int(best[0])], whole, counts),
                "over whole: the least similar layer shares": perplexity_ratio(costs[int(best[-1])], whole, counts),
                "nats a token lost by sharing, more similar half": easy,
                "nats a token lost by sharing, less similar half": hard,
                "nats more where heads are in another order": gap,
            },
            {
                "the more similar, the cheaper (above chance)": predicts.low > 0,
                "cheaper in the more similar half": easy.high < hard.low,
                "it matters whose attention is shared": gap.low > 0,
                "the most similar layer shares within 1%": costs != []
                and perplexity_ratio(costs[int(best[0])], whole, counts).value < 1.01,
            },
        )


@torch.no_grad()
def shared_nll(model: PreTrainedModel, ids: Tensor, at: int | None, shift: int = 0) -> list[float]:
    """Nats of each block of 64 tokens, where one layer attends by the weights of the layer before.

    Args:
        model: the model.
        ids: LongTensor (1, token).
        at: the layer; None: none does.
        shift: its heads take the weights of the head so many further on.
    """
    kept: dict[int, Tensor] = {}

    def attention(call: Call) -> Tensor:
        weights = weights_of(call)
        if at is not None and call.layer == at - 1:
            kept[0] = weights
        if call.layer == at:
            weights = kept.pop(0).flatten(1, 2).roll(-shift, 1).view_as(weights)
        return (weights.to(call.value.dtype) @ call.value[:, :, None]).flatten(1, 2)

    with replaced_attention(model, attention, "similar-attention"):
        losses = surprisal(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:])[0].double()
    return [float(each.mean() * BLOCK) for each in losses.split(BLOCK)]
