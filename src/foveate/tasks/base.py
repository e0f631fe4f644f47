"""What a task is: an experiment that says whether a model still works under a recipe."""

from __future__ import annotations

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import Text
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Recipe, Registry, Spec, apply
from foveate.models.anatomy import anatomy
from foveate.models.caches import cache_bytes, full_cache_bytes

C = TypeVar("C", bound=type)

Progress = Callable[[float], None]
"""Called now and then with the fraction of the work that is done, 0 to 1."""


@dataclass
class Bench:
    """What a task works on.

    Attributes:
        model, tokenizer: with a recipe in force, unless the task applies it itself.
        text: the text whose `evaluation` part the task may read.
        progress: to be called with the fraction done.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: Text
    progress: Progress = field(default=lambda fraction: None)


@dataclass
class Outcome:
    """What a task measured: metrics by name, and artifacts (JSON-ready) that the page shows."""

    metrics: dict[str, Metric]
    artifacts: dict[str, Any] = field(default_factory=dict)


class Task(Spec):
    """A task: a frozen dataclass of its settings, and `run`.

    Class attributes: `name`; `title`, a few words for people.
    """

    title: ClassVar[str]

    @property
    def context(self) -> int | None:
        """Tokens that a cache budget `keep` is a fraction of; None: the prompt, as it comes."""
        return None

    @property
    def longest(self) -> int:
        """Tokens of the longest context that the full model must be able to hold."""
        return 0

    def cost(self) -> float:
        """Work, in tokens through the model, for the estimate of the time left."""
        return 1000.0

    def check(self, bench: Bench) -> None:
        """Raise FoveateError where the task can't be run on this model and text, before any cell runs."""
        limit = anatomy(bench.model).max_positions
        if self.longest > limit:
            raise FoveateError(
                f"{self}: a context of {self.longest} tokens is longer than the {limit} positions of this model: "
                f"ask for at most {limit}."
            )

    @abstractmethod
    def run(self, bench: Bench) -> Outcome:
        """Run with whatever recipe is in force on `bench.model`."""

    def measure(self, bench: Bench, recipe: Recipe) -> Outcome:
        """Run under a recipe. A task that compares recipes against each other overrides this."""
        with apply(bench.model, recipe, context=self.context, tokenizer=bench.tokenizer):
            return self.run(bench)


def load_tasks() -> None:
    """Import every file of this room, so that all tasks register."""
    package = importlib.import_module("foveate.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"foveate.tasks.{module.name}")


TASKS: Registry[Task] = Registry("task", load_tasks)


def task(name: str) -> Callable[[C], C]:
    """Class decorator: register a task under its short name, as a frozen keyword-only dataclass."""
    return TASKS.register(name)


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """One forward of token ids (batch, n) onto a cache: logits (batch, n, vocab) in float32, and the cache."""
    out = model(ids, past_key_values=cache, use_cache=True)
    return out.logits.float(), out.past_key_values


@torch.no_grad()
def surprisal(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats (batch, n) of targets (batch, n) under logits (batch, n, vocab)."""
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def cache_metrics(model: PreTrainedModel, cache: Any, tokens: int) -> dict[str, Metric]:
    """`cache_bytes` really held, and `cache_fraction` of what the unchanged model's full cache holds for `tokens`."""
    held = cache_bytes(cache)
    return {
        "cache_bytes": Metric.exact(held),
        "cache_fraction": Metric.exact(held / full_cache_bytes(model, tokens)),
    }
