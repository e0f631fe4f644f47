"""Layers: how much each layer, and each attention and MLP in it, changes what passes through."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim, random_others
from foveate.measure.bootstrap import Metric, mean, perplexity, perplexity_ratio
from foveate.measure.ranks import correlation
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.patching import Kind, Patch, Site, patched
from foveate.models.surgery import has_attention, has_mlp
from foveate.probes.base import Data, Lines, Reading, Role, probe
from foveate.probes.watch import Through, Watch, Watcher
from foveate.scores.change import CHANGED, changes, norms_after
from foveate.tasks.base import Bench, passages, surprisal

SUBLAYERS: tuple[Kind, ...] = ("attention", "mlp")
NOTHING = 1e-5
"""A change below this is what rounding makes of none."""


@probe("layers")
class Layers(Watcher):
    """How much each layer, attention sublayer and MLP turns the residual stream: 1 - cosine of before and after.

    These are the scores by which `drop-attention`, `drop-mlp` and `drop-sublayers` choose, here averaged over the
    reader's text and code. A sublayer that changes little is a candidate to leave, but it need not be useless: a small
    change can be the one that counts. So only one that adds nothing at all is called idle.

    Source: What Matters in Transformers? Not All Attention is Needed (2024); ShortGPT: Layers in Large
    Language Models are More Redundant Than You Expect (2024) has the same measure of whole layers.

    Example:
        >>> import foveate as fv
        >>> model = fv.planted()
        >>> reading = Layers().measure(model, Data.of(model, fv.tiny_tokenizer(), length=64, passages=1))
        >>> [role.name for role in reading.roles]       # of its MLPs only the first was planted
        ['mlp 1', 'mlp 2']
    """

    paper: ClassVar[Paper | None] = Paper(
        "What Matters in Transformers? Not All Attention is Needed", 2024, "https://arxiv.org/abs/2406.15786"
    )
    claim: ClassVar[str] = "what changes the residual stream least can leave at least cost"
    title: ClassVar[str] = "Which layers change little?"
    default: ClassVar[bool] = True
    streams: ClassVar[tuple[str, ...]] = ("mine", "code")

    def watch(self, model: PreTrainedModel, data: Data) -> Watch:
        return _Watch(model)


class _Watch(Watch):
    attention_wanted = False

    def __init__(self, model: PreTrainedModel):
        self.parts, self.norms = anatomy(model), norms_after(model)
        self.sublayers = [Site("attention", layer.index) for layer in self.parts.layers if has_attention(layer)]
        self.sublayers += [Site("mlp", layer.index) for layer in self.parts.layers if has_mlp(layer)]
        self.found: dict[str, list[Tensor]] = {kind: [] for kind in CHANGED}

    def sites(self) -> list[Site]:
        return [*(Site("residual", at) for at in range(len(self.parts.layers) + 1)), *self.sublayers]

    def through(self, passage: Through) -> None:
        values, found = passage.values, {kind: torch.full((len(self.norms),), torch.nan) for kind in CHANGED}
        for at, norms in enumerate(self.norms):
            there = {kind: Site(kind, at) for kind in SUBLAYERS}
            added: dict[str, Tensor] = {kind: values[site] for kind, site in there.items() if site in values}
            added = {kind: norms[kind](value) if kind in norms else value for kind, value in added.items()}
            for kind, each in changes(values[Site("residual", at)], values[Site("residual", at + 1)], added).items():
                found[kind][at] = each.double().mean().float().cpu()
        for kind in CHANGED:
            self.found[kind].append(found[kind])

    def reading(self) -> Reading:
        means = {kind: torch.stack(found).double().mean(0) for kind, found in self.found.items()}
        scores = {kind: UnitScores(kind, each[:, None]) for kind, each in means.items()}
        roles = [
            Role(kind, int(at), 0, "idle", 1.0, f"The {_WORDS[kind]} of layer {int(at)} adds nothing on what was read.")
            for kind in ("attention", "mlp")
            for at in (means[kind] < NOTHING).nonzero().flatten()
        ]
        metrics = {
            f"change by {_MANY[kind]}, mean": mean([float(row.nanmean()) for row in self.found[kind]])
            for kind in CHANGED
            if not means[kind].isnan().all()
        }
        panel = Lines(
            "How much of the stream's direction changes",
            "layer",
            "1 - cosine of before and after",
            {_MANY[kind]: [(at, x) for at, x in enumerate(means[kind].tolist()) if x == x] for kind in CHANGED},
        )
        return Reading("layers", Layers.title, _summary(means), metrics, scores, roles, [panel], {"idle": NOTHING})


_WORDS = {"attention": "attention", "mlp": "MLP", "layer": "layer"}
_MANY = {"attention": "attention", "mlp": "MLPs", "layer": "whole layers"}


def _summary(means: dict[str, Tensor]) -> str:
    """The layers at both ends, in words."""
    ends = []
    for kind in ("attention", "mlp"):
        there = [at for at in means[kind].argsort(stable=True).tolist() if means[kind][at] == means[kind][at]]
        if there:
            least = ", ".join(str(at) for at in sorted(there[: max(1, min(4, len(there) // 4))]))
            most = there[-1]
            ends.append(
                f"{'Attention changes' if kind == 'attention' else 'MLPs change'} what passes through least in "
                f"{'layer' if ',' not in least else 'layers'} {least} (by {means[kind][there[0]]:.1%} at the least), "
                f"and most in layer {most} ({means[kind][most]:.0%})."
            )
    return " ".join(ends) or "This model's layers have neither attention nor MLPs."


# ---- the claim ------------------------------------------------------------------------------------------------------

COUNT = 4
"""Sublayers that are switched off at once."""


@claim("layers")
class SmallChangesCostLittle(Claim):
    statement: ClassVar[str] = (
        "sublayers and layers that turn the residual stream least are the redundant ones: without them the model loses "
        "least, and attention more of all is redundant (abstract)"
    )
    setting: ClassVar[str] = (
        "scores on 4 passages of 512 tokens each of prose and code; every sublayer switched off alone, on 512 tokens "
        "of evaluation text; the 4 that change least of a kind switched off together, on 1,024 tokens, against three "
        "random sets of 4, intervals over blocks of 64 tokens"
    )

    def run(self, bench: Bench) -> Finding:
        model = bench.model
        count = len(anatomy(model).layers)
        scores = Layers().measure(model, Data(bench.tokenizer, bench.text)).scores
        texts = passages(bench, 2, min(512, anatomy(model).max_positions))
        # Nothing, every sublayer alone, then the sets of each kind.
        alone = [(kind, at) for kind in SUBLAYERS for at in range(count)]
        steps, done = 2 + len(alone) // 2 + 4 * len(CHANGED), 0.0

        def without(off: list[tuple[Kind, int]], texts: list[Tensor]) -> list[float]:
            nonlocal done
            done += len(texts) / 2
            bench.progress(min(1.0, done / steps))
            return _nll(model, texts, off)

        whole = without([], texts)
        half = len(whole) // 2
        cost = {each: sum(without([each], texts[:1])) - sum(whole[:half]) for each in alone}
        metrics, checks = {"perplexity, whole model": perplexity(whole, [BLOCK] * len(whole))}, {}
        over: dict[str, Metric] = {}
        for kind in CHANGED:
            change = scores[kind].scores[:, 0]
            kinds = [each for each in SUBLAYERS if kind in (each, "layer")]
            if kind != "layer":
                costs = torch.tensor([cost[kinds[0], at] for at in range(count)])
                metrics[f"rank correlation of change and cost, {kind}"] = (alike := correlation(change, costs))
                checks[f"{kind}: the less it changes, the less it costs (above chance)"] = alike.low > 0
            sets = [change.argsort()[:COUNT].tolist()]
            sets += [random_others(count, COUNT, sets[0], seed) for seed in range(3)]
            lost = [without([(k, at) for at in each for k in kinds], texts) for each in sets]
            over[kind] = perplexity_ratio(lost[0], whole, [BLOCK] * len(whole))
            metrics[f"over whole: {kind}, the {COUNT} that change least"] = over[kind]
            for turn, each in enumerate(lost[1:]):
                metrics[f"over whole: {kind}, random set {turn + 1}"] = perplexity_ratio(
                    each, whole, [BLOCK] * len(whole)
                )
            checks[f"{kind}: cheaper than all three random sets"] = all(
                perplexity_ratio(lost[0], each, [BLOCK] * len(whole)).high < 1 for each in lost[1:]
            )
        checks["attention is more redundant than MLPs"] = over["attention"].high < over["mlp"].low
        return Finding(metrics, checks)


BLOCK = 64
"""Tokens whose losses are summed, for intervals."""


@torch.no_grad()
def _nll(model: PreTrainedModel, texts: list[Tensor], off: list[tuple[Kind, int]]) -> list[float]:
    """Nats of each block of the texts, LongTensor (1, token) each, while sublayers, (kind, layer), add nothing."""
    blocks: list[float] = []
    nothing: dict[Site, Patch] = {Site(kind, at): torch.zeros_like for kind, at in off}
    with patched(model, nothing):
        for ids in texts:
            losses = surprisal(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:])[0].double()
            blocks += [float(each.mean() * BLOCK) for each in losses.split(BLOCK)]
    return blocks
