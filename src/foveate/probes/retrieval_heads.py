"""Retrieval heads: the few that look at what they copy, wherever in the text it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.measure.bootstrap import Metric, mean
from foveate.measure.ranks import rank_correlation
from foveate.methods import Paper, Target
from foveate.models.anatomy import anatomy
from foveate.models.patching import ablated
from foveate.probes.base import Data, Lines, Panel, Probe, Reading, Rows, clear_heads, counted, named, probe
from foveate.scores import Retrieved, needle_length, retrieved
from foveate.scores.known import CASES, LENGTH, TOKENS
from foveate.tasks.base import Bench
from foveate.tasks.passkey import Passkey

LEAST = 0.1
"""Of the tokens that are copied: from here on a head is called a retrieval head (the paper's threshold, section 2)."""


@probe("retrieval-heads")
class RetrievalHeads(Probe):
    """Which heads look at a fact in a long text while it is being copied into the answer.

    Numbers are hidden in 12 texts of 1,024 tokens (fewer, where the model has fewer positions) and asked for. The score
    is the share of the answer's tokens at which the entry that a head attends to most is the very token of the needle
    that comes next. It is the measurement that `budget=retrieval` spends: made once a model, and kept on disk.

    Source: Retrieval Head Mechanistically Explains Long-Context Factuality (2024), section 2: the score, the threshold
    of 0.1, and (section 3.2) that some heads are active whatever the context is, others in some contexts. Ours: the
    answer is read and not generated, so that a model that fails to answer is scored too.

    Example:
        >>> import foveate as fv
        >>> model = fv.planted()
        >>> reading = RetrievalHeads().measure(model, Data.of(model, fv.tiny_tokenizer()))
        >>> reading.of_role("retrieval")
        [(1, 3)]
    """

    paper: ClassVar[Paper | None] = Paper(
        "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024, "https://arxiv.org/abs/2404.15574"
    )
    claim: ClassVar[str] = "less than a twentieth of the heads finds facts in a long text; without them it fails"
    title: ClassVar[str] = "Which heads find facts in a long text?"
    default: ClassVar[bool] = True

    def check(self, model: PreTrainedModel, data: Data) -> None:
        target = Target.of(model, tokenizer=data.tokenizer)
        needle_length(target, target.calibration(TOKENS))

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        return float(CASES * min(LENGTH, anatomy(model).max_positions))

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        training = model.training
        model.eval()
        try:
            found = retrieved(Target.of(model, tokenizer=data.tokenizer), data.progress)
        finally:
            model.train(training)
        data.progress(1.0)
        scores = found.scores()
        active = (found.hits > 0).sum(0)
        roles = clear_heads(
            scores,
            LEAST,
            "retrieval",
            lambda s: (
                f"While a fact from far back is copied, it looks at the very next token of it {s:.0%} of the time."
            ),
        )
        total = scores.scores.numel()
        summary = f"{counted(len(roles), 'head')} of {total} look at a fact in a long text while it is copied" + (
            f": {named(roles)}." if roles else ": none does it clearly."
        )
        if roles:
            always = sum(int(active[r.layer, r.unit]) == CASES for r in roles)
            summary += f" {counted(always, 'head')} did so for every fact that was asked for, the rest for some."
        metrics = {
            "share of heads that are retrieval heads": Metric.exact(len(roles) / total),
            "highest score": Metric.exact(float(scores.scores.max())),
            "heads that are active for every needle": Metric.exact(float((active == CASES).sum())),
        }
        if (alike := stability(found)) is not None:
            metrics["rank correlation of the scores on two sets of needles"] = Metric.exact(alike)
        ordered = scores.scores.flatten().sort(descending=True).values.tolist()
        panels: list[Panel] = [
            Lines(
                "Heads by their score",
                "heads, the highest first",
                "share of copied tokens that a head looked at",
                {"score": [(float(i + 1), s) for i, s in enumerate(ordered)]},
            ),
            Rows(
                f"The highest heads, on {CASES} needles",
                ["head", "score", "needles it was active for"],
                [[r.name, round(r.score, 3), int(active[r.layer, r.unit])] for r in roles[:20]],
            ),
        ]
        setting = {"least": LEAST, "needles": CASES, "length": found.length, "text": "prose"}
        return Reading("retrieval-heads", self.title, summary, metrics, {"retrieval": scores}, roles, panels, setting)


def stability(found: Retrieved) -> float | None:
    """How alike heads rank on two sets of needles, those that have any score on either: Spearman's correlation.

    Needles with even and odd numbers share no wording and no number; both sets stand at all depths.
    """
    even, odd = (found.scores(slice(first, None, 2)).scores.flatten() for first in (0, 1))
    there = (even > 0) | (odd > 0)
    return rank_correlation(even[there], odd[there])


KS = (3, 5, 8, 10, 13)
"""How many heads are masked; 13 are 5% of the default model's 270."""
PASSKEY = {"cases": 8, "tokens": 1024}


@claim("retrieval-heads")
class RetrievalHeadsRetrieve(Claim):
    statement: ClassVar[str] = (
        "less than 5% of the heads are retrieval heads; masking them breaks retrieval from a long text, and masking as "
        "many random heads does not (abstract)"
    )
    setting: ClassVar[str] = (
        "heads chosen by their score on 12 needles in calibration text; judged on 8 pass keys, asked for in other "
        "words, in 1,024 tokens of other text; the 3, 5, 8, 10 and 13 highest heads set to zero (13 are 5%), and as "
        "many random ones as were enough, three sets out of all other heads and three out of those below the threshold"
    )

    def run(self, bench: Bench) -> Finding:
        model, heads = bench.model, anatomy(bench.model).heads
        found = retrieved(Target.of(model, tokenizer=bench.tokenizer), lambda done: bench.progress(0.1 * done))
        flat = found.scores().scores.flatten()
        order = flat.argsort(descending=True, stable=True).tolist()
        most = max(1, int(0.05 * len(order)))
        ks = sorted({*(k for k in KS if k <= most), most})
        runs, of = 0, 1 + len(ks) + 6

        def keys(masked: Sequence[int]) -> Metric:
            nonlocal runs
            given: dict[str, Any] = PASSKEY
            quiet = replace(bench, progress=lambda part: bench.progress(0.1 + 0.9 * (runs + part) / of))
            with ablated(model, [divmod(head, heads) for head in masked]):
                metric = Passkey(**given).run(quiet).metrics["passkey"]
            runs += 1
            return metric

        whole = keys([])
        masked = {k: keys(order[:k]) for k in ks}
        enough = next((k for k in ks if masked[k].value <= 2 / 8), most)
        pools = {
            "other heads": order[enough:],
            "heads below the threshold": [head for head in order[enough:] if flat[head] < LEAST],
        }
        random = {
            f"without {enough} {name}, set {seed + 1}": keys(_drawn(pool, enough, seed))
            for name, pool in pools.items()
            for seed in range(3)
        }
        clear = int((flat >= LEAST).sum())
        stable = stability(found)
        metrics = {
            "pass keys found, whole model": whole,
            **{f"without the {k} highest heads": metric for k, metric in masked.items()},
            **random,
            "heads masked until at most a quarter is found": Metric.exact(float(enough)),
            "share of heads with a score of 0.1 or more": mean((flat >= LEAST).double().tolist()),
            "rank correlation of the scores on two sets of needles": Metric.exact(
                float("nan") if stable is None else stable
            ),
        }
        others = [metric.value for name, metric in random.items() if "other heads" in name]
        return Finding(
            metrics,
            {
                "less than 5% of the heads are retrieval heads": 0 < clear < 0.05 * len(order),
                "the whole model finds all pass keys": whole.value == 1,
                f"without the {enough} highest heads at most 2 of 8": masked[enough].value <= 2 / 8,
                "without as many random other heads at least 7 of 8, in all three sets": min(others) >= 7 / 8,
                "heads rank alike on two sets of needles": stable is not None and stable > 0.5,
            },
        )


def _drawn(pool: Sequence[int], count: int, seed: int) -> list[int]:
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return [pool[i] for i in order[:count].tolist()]
