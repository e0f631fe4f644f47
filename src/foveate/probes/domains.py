"""Domains: heads that work on one kind of text, and rest on the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim, random_others
from foveate.data.text import load_text
from foveate.measure.bootstrap import Metric, perplexity_ratio
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.patching import ablated
from foveate.probes.base import Data, Grid, Panel, Reading, Role, Rows, named, probe
from foveate.probes.watch import Seen, Through, Watch, Watcher
from foveate.tasks.base import Bench, passages, surprisal

CLEAR = 0.1
"""Of a head's attention: from here on a difference between two kinds of text is clear, if passages agree."""
ERRORS = 4.0
"""Standard errors that such a difference must have."""

LENGTH = 256
"""Tokens of a passage, for the claim."""


@probe("domains")
class Domains(Watcher):
    """Which heads work on prose only, or on code only?

    A head that has nothing to do rests on the first token. So what it gives to all other tokens says how much it works:
    its "activity", averaged over the queries after the first quarter of a passage. It is measured on prose and on code.
    A head is said to be active on one of the two where its activity is higher there by a tenth of its attention or
    more, and by 4 standard errors or more over passages, and higher in each passage than in any of the other kind. And
    on the other kind it must rest: there, half of its attention or more goes to the first token. It takes two passages
    of each kind at least; with four or more, chance finds hardly any head.

    The paper looks at single heads by eye; the rule is ours.

    Source: Active-Dormant Attention Heads (2024).

    Example:
        >>> import foveate as fv
        >>> model = fv.planted()
        >>> reading = Domains().measure(model, Data.of(model, fv.tiny_tokenizer(), length=64))
        >>> reading.summary
        'No head is clearly active on one of prose and code, and at rest on the other.'
    """

    paper: ClassVar[Paper | None] = Paper(
        "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
        2024,
        "https://arxiv.org/abs/2410.13835",
    )
    claim: ClassVar[str] = "some heads work on one kind of text and rest on others: without them only that kind suffers"
    title: ClassVar[str] = "Which heads work on one kind of text only?"
    default: ClassVar[bool] = True
    streams: ClassVar[tuple[str, ...]] = ("prose", "code")

    def watch(self, model: PreTrainedModel, data: Data) -> Watch:
        return _Watch(model)


class _Watch(Watch):
    def __init__(self, model: PreTrainedModel):
        parts = anatomy(model)
        self.now = torch.zeros(len(parts.layers), parts.heads, dtype=torch.float64)
        self.active: dict[str, list[Tensor]] = {name: [] for name in Domains.streams}

    def attention(self, seen: Seen) -> None:
        skipped = len(seen.ids) // 4
        late = seen.weights[:, max(0, skipped - seen.start) :, 0]
        self.now[seen.layer] += (1 - late.double()).sum(1).cpu() / (len(seen.ids) - skipped)

    def through(self, passage: Through) -> None:
        self.active[passage.stream].append(self.now.clone())
        self.now.zero_()

    def reading(self) -> Reading:
        by_stream = {name: torch.stack(values) for name, values in self.active.items()}
        activity = {name: values.mean(0) for name, values in by_stream.items()}
        gap = activity["code"] - activity["prose"]
        enough = min(map(len, by_stream.values())) >= 2
        error = _error(by_stream["code"], by_stream["prose"]) if enough else torch.full_like(gap, torch.inf)
        roles = []
        for there, other, sign in (("code", "prose", 1), ("prose", "code", -1)):
            apart = by_stream[there].amin(0) > by_stream[other].amax(0)
            clear = (sign * gap >= CLEAR) & (sign * gap >= ERRORS * error) & apart
            only = clear & (activity[other] <= 0.5)
            for layer, head in only.nonzero().tolist():
                a, b = float(activity[there][layer, head]), float(activity[other][layer, head])
                words = (
                    f"It works on {there}, where {a:.0%} of its attention goes beyond the first token, and rests on "
                    f"{other}, where {b:.0%} does."
                )
                roles.append(Role("head", layer, head, f"active on {there} only", a - b, words))
        roles.sort(key=lambda role: -role.score)
        found = {name: [r for r in roles if r.role == f"active on {name} only"] for name in ("code", "prose")}
        parts = [f"{len(having)} on {name} only ({named(having)})" for name, having in found.items() if having]
        summary = (
            f"Heads that work on one kind of text and rest on the other: {', '.join(parts)}."
            if parts
            else "No head is clearly active on one of prose and code, and at rest on the other."
        )
        scores = {f"active on {name}": UnitScores("head", values) for name, values in activity.items()}
        metrics = {f"heads active on {name} only": Metric.exact(len(having)) for name, having in found.items()}
        flat = gap.flatten()
        order = flat.argsort()
        ends = [*order.flip(0)[:5].tolist(), *order[:5].flip(0).tolist()]
        rows = [
            [f"{i // gap.shape[1]}.{i % gap.shape[1]}", *(round(float(v.flatten()[i]), 3) for v in activity.values())]
            for i in dict.fromkeys(ends)
        ]
        panels: list[Panel] = [
            Grid("Attention beyond the first token, on code less on prose", "head", "layer", gap.tolist()),
            Rows("Heads that differ most", ["head", *(f"active on {name}" for name in activity)], rows),
        ]
        setting = {"clear": CLEAR, "standard errors": ERRORS, "at rest": 0.5}
        return Reading("domains", Domains.title, summary, metrics, scores, roles, panels, setting)


def _error(a: Tensor, b: Tensor) -> Tensor:
    """The standard error of the difference of two means over passages, (passage, layer, head) to (layer, head).

    Of few passages, a spread can come out small by chance: no head's counts as smaller than the median head's.
    """
    spreads = [each.var(0) for each in (a, b)]
    floored = [spread.clamp(min=float(spread.median())) for spread in spreads]
    return (floored[0] / len(a) + floored[1] / len(b)).sqrt()


@claim("domains")
class DormantHeadsAreIdle(Claim):
    statement: ClassVar[str] = (
        "many heads are active on some kinds of text and dormant, resting on the first token, on others, where they "
        "can be taken away without loss (Llama 2, a head active on code)"
    )
    setting: ClassVar[str] = (
        "of the heads that give half of their attention or more to the first token on one kind of text, the 5 whose "
        "activity is most higher on the other, on 8 passages of 256 tokens of calibration prose and code; set to zero, "
        "against 3 random sets of 5 heads; perplexity on 16 passages of 256 tokens of evaluation prose and code"
    )

    count: ClassVar[int] = 5
    passages: ClassVar[int] = 16

    def run(self, bench: Bench) -> Finding:
        model, parts = bench.model, anatomy(bench.model)
        given = Data(bench.tokenizer, bench.text, LENGTH, 8, progress=lambda done: bench.progress(0.2 * done))
        scores = Domains().measure(model, given).scores
        sets: dict[str, list[tuple[int, int]]] = {"no heads": []}
        for name, other in (("code", "prose"), ("prose", "code")):
            here, there = scores[f"active on {name}"].scores, scores[f"active on {other}"].scores
            gap = (here - there).masked_fill(there > 0.5, -1.0)
            best = gap.flatten().topk(min(self.count, gap.numel()))
            kept = best.indices[best.values > 0].tolist()
            sets[f"{len(kept)} heads most active on {name} only"] = [divmod(i, parts.heads) for i in kept]
        total = len(parts.layers) * parts.heads
        chosen = [layer * parts.heads + head for heads in sets.values() for layer, head in heads]
        for seed in range(3):
            drawn = random_others(total, self.count, chosen, seed)
            sets[f"{self.count} random heads, set {seed + 1}"] = [divmod(i, parts.heads) for i in drawn]
        texts = {name: _Text(bench, name, self.passages) for name in ("code", "prose")}
        found: dict[str, _Ratios] = {}
        whole: dict[str, list[float]] = {}
        for done, (name, heads) in enumerate(sets.items()):
            with ablated(model, heads):
                nats = {kind: text.nats(model) for kind, text in texts.items()}
            if name == "no heads":
                whole = nats
            else:
                found[name] = _Ratios.of(nats, whole)
            bench.progress(0.2 + 0.8 * (done + 1) / len(sets))
        on_code, on_prose, *random = found.values()
        return Finding(
            {
                **{f"perplexity on {k}, without {n} over whole": r.kinds[k] for n, r in found.items() for k in r.kinds},
                **{f"that on code over that on prose, without {n}": r.code_over_prose for n, r in found.items()},
            },
            {
                "without heads active on code, code suffers": on_code.kinds["code"].low > 1,
                "and prose less (by more than the interval)": on_code.code_over_prose.low > 1,
                "and by less than 1%": on_code.kinds["prose"].high < 1.01,
                "without heads active on prose, prose suffers": on_prose.kinds["prose"].low > 1,
                "and code less (by more than the interval)": on_prose.code_over_prose.high < 1,
                "and by less than 1% there": on_prose.kinds["code"].high < 1.01,
                "random heads set the two apart less than either": all(
                    on_prose.code_over_prose.high < r.code_over_prose.value < on_code.code_over_prose.low
                    for r in random
                ),
            },
        )


class _Text:
    """Passages of the evaluation part of a text, and what a model says of them."""

    def __init__(self, bench: Bench, name: str, count: int):
        text = bench.text if bench.text.name == name else load_text(name)
        self.rows = passages(Bench(bench.model, bench.tokenizer, text), count, LENGTH)

    @torch.no_grad()
    def nats(self, model: PreTrainedModel) -> list[float]:
        """Summed nats of each passage."""
        return [float(surprisal(model(r, use_cache=False).logits[:, :-1], r[:, 1:]).sum()) for r in self.rows]


@dataclass(frozen=True)
class _Ratios:
    """Perplexities over those of the whole model.

    Attributes:
        kinds: on each kind of text, paired by passage.
        code_over_prose: the ratio on code over the ratio on prose, passages of both drawn independently.
    """

    kinds: dict[str, Metric]
    code_over_prose: Metric

    @classmethod
    def of(cls, nats: dict[str, list[float]], whole: dict[str, list[float]]) -> _Ratios:
        counts = [LENGTH - 1] * len(nats["code"])
        kinds = {k: perplexity_ratio(nats[k], whole[k], counts, seed=i) for i, k in enumerate(nats)}
        # Passages of code and of prose are no pairs. Pairing them by place is a random pairing, and does no harm.
        rises = {k: [a - b for a, b in zip(nats[k], whole[k], strict=True)] for k in nats}
        return cls(kinds, perplexity_ratio(rises["code"], rises["prose"], counts))
