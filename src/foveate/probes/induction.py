"""Induction: heads that continue what came before, and the heads that they are made of."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim, random_others
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.patching import ablated
from foveate.probes.base import Data, Reading, clear_heads, named, probe
from foveate.probes.watch import Seen, Watch, Watcher
from foveate.tasks.base import Bench, surprisal

LEAST = 0.3
"""Of a head's attention, on the average: from here on its role is called clear."""


@probe("induction")
class Induction(Watcher):
    """Which heads, at a token that came before, look at what came after it then.

    The passage is random tokens, and then the same again, so that nothing but the repetition can guide attention.
    Scores are a head's attention, averaged over the second half: to the token after the same one ("induction"), to the
    same one ("duplicate"), and over the whole passage to the token before ("previous").

    Source: In-context Learning and Induction Heads (2022), "prefix matching", argument 2.

    Example:
        >>> import foveate as fv
        >>> model = fv.planted()
        >>> reading = Induction().measure(model, Data.of(model, fv.tiny_tokenizer(), length=64))
        >>> reading.of_role("induction"), reading.of_role("previous token")
        ([(1, 3)], [(0, 1)])
    """

    paper: ClassVar[Paper | None] = Paper(
        "In-context Learning and Induction Heads", 2022, "https://arxiv.org/abs/2209.11895"
    )
    claim: ClassVar[str] = "a few heads do most of a model's copying of what came before"
    title: ClassVar[str] = "Which heads continue what came before?"
    default: ClassVar[bool] = True
    streams: ClassVar[tuple[str, ...]] = ("repeat",)

    def watch(self, model: PreTrainedModel, data: Data) -> Watch:
        return _Watch(model)


class _Watch(Watch):
    def __init__(self, model: PreTrainedModel):
        parts = anatomy(model)
        shape = len(parts.layers), parts.heads
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name in ("induction", "previous", "duplicate")}
        self.counts = dict.fromkeys(self.sums, 0)

    def begin(self, ids: Tensor) -> None:
        period = len(ids) // 2
        for name, first in (("induction", period + 1), ("previous", 1), ("duplicate", period)):
            self.counts[name] += max(0, len(ids) - first)

    def attention(self, seen: Seen) -> None:
        period = len(seen.ids) // 2
        queries = torch.arange(seen.start, seen.start + seen.weights.shape[1])
        # The first token of the second half can't know yet that it is the second half.
        for name, back, first in (
            ("induction", period - 1, period + 1),
            ("previous", 1, 1),
            ("duplicate", period, period),
        ):
            rows = queries[queries >= first]
            if len(rows):
                looked = seen.weights[:, rows - seen.start, rows - back]
                self.sums[name][seen.layer] += looked.double().sum(-1).cpu()

    def reading(self) -> Reading:
        scores = {name: UnitScores("head", self.sums[name] / max(1, self.counts[name])) for name in self.sums}
        roles = [
            *clear_heads(
                scores["induction"],
                LEAST,
                "induction",
                lambda s: f"At a token that came before, {s:.0%} of its attention goes to what came after it then.",
            ),
            *clear_heads(
                scores["previous"],
                LEAST,
                "previous token",
                lambda s: f"{s:.0%} of its attention goes to the token before.",
            ),
            *clear_heads(
                scores["duplicate"],
                LEAST,
                "duplicate token",
                lambda s: f"At a token that came before, {s:.0%} of its attention goes to where it stood.",
            ),
        ]
        found = {role: [r for r in roles if r.role == role] for role in ("induction", "previous token")}
        summary = (
            f"Heads that continue what came before: {len(found['induction'])}"
            + (f" ({named(found['induction'])})" if found["induction"] else "")
            + f". Heads that look at the token before: {len(found['previous token'])}"
            + (f" ({named(found['previous token'])})." if found["previous token"] else ".")
        )
        best = {f"highest {name} score": Metric.exact(float(s.scores.max())) for name, s in scores.items()}
        return Reading("induction", Induction.title, summary, best, scores, roles, setting={"least": LEAST})


@claim("induction")
class InductionHeadsCopy(Claim):
    statement: ClassVar[str] = (
        "induction heads carry most of the copying of what came before: without them repeated text is hardly easier to "
        "predict than new text (arguments 2 and 3)"
    )
    setting: ClassVar[str] = (
        "16 passages of 128 random tokens and the same again; the 5% of heads with the highest induction scores of "
        "other passages set to zero, against three random sets of as many others"
    )

    def run(self, bench: Bench) -> Finding:
        model, parts = bench.model, anatomy(bench.model)
        found = Induction().measure(model, Data(bench.tokenizer, bench.text, length=256, passages=4, seed=1))
        count = max(1, round(0.05 * len(parts.layers) * parts.heads))
        total = len(parts.layers) * parts.heads
        best = found.scores["induction"].scores.flatten().argsort(descending=True)[:count].tolist()
        sets = [best, *(random_others(total, count, best, seed) for seed in range(3))]
        ids = Data(bench.tokenizer, bench.text, length=256, passages=16, seed=2).stream("repeat", model)
        gains = []
        for done, heads in enumerate([[], *sets]):
            with torch.no_grad(), ablated(model, [divmod(h, parts.heads) for h in heads]):
                rows = []
                for row in ids:
                    losses = surprisal(model(row[None]).logits[:, :-1], row[None, 1:])[0]
                    half = len(row) // 2
                    rows.append(float(losses[: half - 1].mean() - losses[half:].mean()))
            gains.append(rows)
            bench.progress((done + 1) / (len(sets) + 1))
        whole, without, *random = (mean(rows) for rows in gains)
        lost = [mean([1 - b / a for a, b in zip(gains[0], rows, strict=True)]) for rows in gains[1:]]
        return Finding(
            {
                "nats that repetition saves, whole model": whole,
                f"without the {count} highest induction heads": without,
                **{f"without {count} random other heads, set {i + 1}": r for i, r in enumerate(random)},
                "of that saving, lost with the induction heads": lost[0],
                **{f"of that saving, lost with random heads, set {i + 1}": r for i, r in enumerate(lost[1:])},
            },
            {
                "without them most of the saving is gone": lost[0].low > 0.5,
                "without as many random heads it stays, in all three sets": all(r.high < 0.25 for r in lost[1:]),
            },
        )
