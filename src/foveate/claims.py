"""Claims: the experiment that could refute what a method is said to do, a small class beside the method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch

from foveate.measure.bootstrap import Metric, perplexity, perplexity_ratio
from foveate.methods import Method, Recipe
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Finding:
    """What an experiment showed.

    Attributes:
        metrics: figures with intervals, by name.
        checks: each thing that the claim says, in words, and whether it held here. The claim holds if all do.
    """

    metrics: dict[str, Metric]
    checks: dict[str, bool]


class Claim(ABC):
    """The smallest honest experiment that could refute what a method is said to do.

    Class attributes: `method` (its short name), `statement` (the paper's, in our words), `setting` (what is run),
    `needs` ("cpu", or "cuda" where it can't be tried without a GPU), `reads` (False where the experiment trains models
    of its own and looks at no other).
    """

    method: ClassVar[str]
    statement: ClassVar[str]
    setting: ClassVar[str]
    needs: ClassVar[str] = "cpu"
    reads: ClassVar[bool] = True

    @abstractmethod
    def run(self, bench: Bench) -> Finding:
        """Run the experiment; `bench.text.evaluation` is what may be judged on."""


CLAIMS: dict[str, type[Claim]] = {}
"""Claims by the name of their method; filled as the rooms are imported (`METHODS.all()`)."""


def claim(name: str) -> Callable[[C], C]:
    """Class decorator: the class is the claim of the method called `name`."""

    def decorate(cls: C) -> C:
        cls.method = name  # type: ignore[attr-defined]
        CLAIMS[name] = cls
        return cls

    return decorate


def random_others(total: int, count: int, chosen: Iterable[int], seed: int) -> list[int]:
    """`count` of `total` units drawn at random among those that are not `chosen`: the control of a causal claim.

    Example:
        >>> random_others(6, 2, chosen=[0, 1, 2, 3], seed=0) in ([4, 5], [5, 4])
        True
    """
    rest = sorted(set(range(total)) - {int(each) for each in chosen})
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:count]
    return [rest[i] for i in order.tolist()]


class Streams:
    """Summed nats a chunk of the same streamed text under one recipe after another: what most claims compare.

    Args:
        bench: model, tokenizer and text.
        task: how the text streams through, and which of its tokens are scored.
        of: how many recipes will be read, for the progress.
    """

    def __init__(self, bench: Bench, task: Perplexity, of: int):
        self.bench, self.task, self.of, self.done = bench, task, of, 0

    def read(self, recipe: str | Method, on: Bench | None = None) -> Stream:
        """The text under a recipe, on another model where a bench with one is given."""
        bench = replace(on or self.bench, progress=lambda part: self.bench.progress((self.done + part) / self.of))
        blocks = self.task.measure(bench, Recipe.of(recipe)).artifacts["blocks"]
        self.done += 1
        return Stream(blocks["nll"], blocks["tokens"])


@dataclass(frozen=True)
class Stream:
    """Summed nats and tokens of each scored chunk."""

    nll: list[float]
    tokens: list[int]

    @property
    def perplexity(self) -> Metric:
        return perplexity(self.nll, self.tokens)

    def over(self, other: Stream) -> Metric:
        """This perplexity over another's on the same chunks, with a paired interval."""
        return perplexity_ratio(self.nll, other.nll, self.tokens)

    def below(self, other: Stream) -> bool:
        """Whether this perplexity is lower by more than the interval of their ratio."""
        return self.over(other).high < 1
