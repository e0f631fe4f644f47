"""The verdict: what a search found against every single technique at the same budget, on evaluation text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from foveate.claims import Stream
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import METHODS, Method, Recipe, Target, apply
from foveate.models.surgery import undone
from foveate.plans import Plan
from foveate.search.axes import cache_share
from foveate.search.goals import Goal
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

NEAR = 0.02
"""How far below the goal's amount a technique may land and still count as one at the same budget."""
OVER = 0.005
"""And how far above it."""
CLOSE = 0.002
"""How near it is taken at once; else what keeps more, or is nearer, is looked for."""


@dataclass(frozen=True)
class Judged:
    """One line of the verdict.

    Attributes:
        recipe: `full`, `search`, or a technique's recipe.
        amount: what the goal counts.
        stream: nats a chunk of the evaluation text; None where it was not read.
        note: why it was not.
    """

    recipe: str
    amount: float
    stream: Stream | None
    note: str = ""

    @property
    def perplexity(self) -> Metric | None:
        """On evaluation text, with its interval."""
        return None if self.stream is None else self.stream.perplexity


@dataclass(frozen=True, kw_only=True)
class Carried(Method):
    """A plan in force: the search's answer as a method."""

    name: ClassVar[str] = "search"
    role: ClassVar[str] = "prune"
    claim: ClassVar[str] = ""

    plan: Plan

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        with undone(target.model) as surgery:
            self.plan.carry_out(target.model, surgery)
            yield


def answer(plan: Plan, beside: str) -> Recipe:
    """The recipe of a plan, and of what stands beside it."""
    return Recipe((Carried(plan=plan), *(Recipe.of(beside).methods if beside else ())))


def rivals(goal: Goal) -> dict[str, Callable[[float], Method]]:
    """Single techniques that make a model cost less, by name; each is made from the fraction that it keeps."""
    roles = ("prune", "depth", "convert") + (("cache",) if goal.name == "memory" else ())
    found: dict[str, Callable[[float], Method]] = {}
    for name, cls in METHODS.all().items():
        needed = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        fields = {f.name for f in dataclasses.fields(cls)}
        if cls.role in roles and "keep" in fields and set(needed) <= {"keep"}:
            found[name] = lambda keep, name=name: METHODS.build(name, {"keep": keep})  # type: ignore[misc]
    return found


def judge(
    bench: Bench,
    goal: Goal,
    plan: Plan,
    beside: str,
    task: Perplexity,
    progress: Callable[[str], None] = lambda what: None,
    names: list[str] | None = None,
    calibration: Tensor | None = None,
) -> list[Judged]:
    """The full model, the search's answer, and each single technique, on the evaluation text of `bench`.

    Args:
        names: techniques to hold the answer against; all that `rivals` finds where None.
        calibration: what recipes are prepared on, as of `apply`.
    """
    whole = goal.amount(bench.model)
    rows = [
        _read(bench, goal, Recipe.of("full"), task, "full"),
        _read(bench, goal, answer(plan, beside), task, "search", calibration),
    ]
    reached = rows[1].amount
    for name, make in rivals(goal).items():
        if names is None or name in names:
            progress(name)
            rows.append(_rival(bench, goal, make, task, reached, whole, calibration))
    return rows


def _read(
    bench: Bench, goal: Goal, recipe: Recipe, task: Perplexity, name: str, calibration: Tensor | None = None
) -> Judged:
    share = cache_share(recipe.methods[-1].to_text()) if recipe.methods[-1].role == "cache" else 1.0
    with apply(bench.model, recipe, context=task.context, calibration=calibration, tokenizer=bench.tokenizer):
        amount = goal.amount(bench.model, share)
        blocks = task.run(bench).artifacts["blocks"]
    return Judged(name, amount, Stream(blocks["nll"], blocks["tokens"]))


def _rival(
    bench: Bench,
    goal: Goal,
    make: Callable[[float], Method],
    task: Perplexity,
    target: float,
    whole: float,
    calibration: Tensor | None,
) -> Judged:
    """A technique at the largest `keep` that comes down to the amount that the search reached."""
    low, high, keep = 0.0, 1.0, round(target / whole, 4)
    best: Judged | None = None
    refused: Judged | None = None
    for _ in range(8):
        method = make(keep)
        recipe = Recipe((method,))
        share = float(getattr(method, "keep", 1.0)) if method.role == "cache" else 1.0
        try:
            with apply(bench.model, recipe, context=task.context, calibration=calibration, tokenizer=bench.tokenizer):
                amount = goal.amount(bench.model, share)
                if abs(amount - target) <= CLOSE * whole:
                    blocks = task.run(bench).artifacts["blocks"]
                    return Judged(recipe.to_text(), amount, Stream(blocks["nll"], blocks["tokens"]))
        except FoveateError as error:
            refused = Judged(recipe.to_text(), whole, None, str(error))
            low = keep  # it can't keep so little
        else:
            here = Judged(recipe.to_text(), amount, None, f"does not come to this budget: {goal.words(amount)}")
            if best is None or _nearer(here, best, target, whole):
                best = here
            if amount > target:
                high = keep
            else:
                low = keep
        keep = round((low + high) / 2, 4)
    if best is None:
        assert refused is not None
        return refused
    if target - NEAR * whole <= best.amount <= target + OVER * whole:
        return _read(bench, goal, Recipe.of(best.recipe), task, best.recipe, calibration)
    return best


def _nearer(one: Judged, other: Judged, target: float, whole: float) -> bool:
    """Whether an amount is the better one to be judged at: as much as the budget allows, else the nearest."""

    def rank(judged: Judged) -> tuple[bool, float]:
        inside = target - NEAR * whole <= judged.amount <= target + OVER * whole
        return not inside, -judged.amount if inside else abs(judged.amount - target)

    return rank(one) < rank(other)


def speeds(bench: Bench, plan: Plan, beside: str, phase: str, prompt: int, tokens: int) -> dict[str, Any]:
    """The measured speed-up of the search's answer, as the task `speed` gives it."""
    from foveate.tasks.speed import Speed

    outcome = Speed(prompt=prompt, tokens=tokens, repeats=5).measure(bench, answer(plan, beside))
    return outcome.metrics[f"{phase}_speedup"].to_json()
