"""How budgets are tried: against the same for all, at the same total."""

from __future__ import annotations

from typing import ClassVar

import torch

from foveate.cache.budgets.base import BUDGETS, Budget
from foveate.cache.budgets.heads import HeadsBudget
from foveate.claims import Claim, Finding, Streams
from foveate.methods import METHODS, Recipe, Target, UnitScores
from foveate.models.anatomy import anatomy
from foveate.tasks.base import Bench
from foveate.tasks.passkey import Passkey
from foveate.tasks.perplexity import Perplexity


class BeatsUniform(Claim):
    """The budget named `method`, over heavy hitters, on streamed text."""

    setting: ClassVar[str] = (
        "h2o with a fifth of a window of 1,024; 2,048 tokens in chunks of 128, the 1,792 after the first eviction"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, window=1024, chunk=128, skip=256), of=3)
        full, uniform = streams.read("full"), streams.read("h2o:keep=0.2")
        ours = streams.read(f"h2o:keep=0.2,budget={self.method}")
        return Finding(
            {
                "perplexity, full cache": full.perplexity,
                "over full: uniform": uniform.over(full),
                f"over full: {self.method}": ours.over(full),
                f"{self.method} over uniform": ours.over(uniform),
            },
            {"better than uniform": ours.below(uniform)},
        )


class FindsPasskeys(Claim):
    """The budget by heads named `method`, over sinks and windows, on pass keys."""

    setting: ClassVar[str] = (
        "half of the cache: a third of the KV heads whole, sinks and a window in the rest; 8 pass keys in 1,024 tokens"
    )

    def run(self, bench: Bench) -> Finding:
        task, found = Passkey(cases=8, tokens=1024), {}
        budgets: dict[str, Budget | None] = {
            "full cache": None,
            self.method: BUDGETS.parse(f"{self.method}:whole=0.33"),
            "random heads": _AnyHeads(whole=0.33),
            "uniform": BUDGETS.parse("uniform"),
        }
        for done, (name, budget) in enumerate(budgets.items()):
            recipe = Recipe.of("full")
            if budget is not None:
                recipe = Recipe.of(METHODS.build("streaming", {"keep": 0.5, "positions": "text", "budget": budget}))
            found[name] = task.measure(bench, recipe).metrics["passkey"]
            bench.progress((done + 1) / len(budgets))
        ours = found[self.method].value
        return Finding(
            {f"pass keys found: {name}": metric for name, metric in found.items()},
            {
                "finds as many as the full cache, or all but one": ours >= found["full cache"].value - 1 / 8,
                "more than as many heads chosen at random": ours > found["random heads"].value,
                "more than the same for all": ours > found["uniform"].value,
            },
        )


class _AnyHeads(HeadsBudget):
    """The control: heads chosen at random."""

    name: ClassVar[str] = "random-heads"

    def scores(self, target: Target) -> UnitScores:
        parts = anatomy(target.model)
        shape = (len(parts.layers), parts.kv_heads)
        return UnitScores("kv_head", torch.rand(shape, generator=torch.Generator().manual_seed(0)))
