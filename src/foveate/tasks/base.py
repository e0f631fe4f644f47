"""What a task is: an experiment that says whether a model still works under a recipe."""

from __future__ import annotations

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, dataclass_transform

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import Text, tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Recipe, apply
from foveate.models.anatomy import anatomy
from foveate.models.caches import cache_bytes, full_cache_bytes, with_cache
from foveate.specs import Registry, Spec

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


@dataclass_transform(frozen_default=True, kw_only_default=True)
def task(name: str) -> Callable[[C], C]:
    """Class decorator: register a task under its short name, as a frozen keyword-only dataclass."""
    return TASKS.register(name)


STEP = 32
"""About how many tokens of a long forward take as long as one forward of a single token: for `Task.cost`."""


def passages(bench: Bench, count: int, length: int) -> list[Tensor]:
    """`count` passages of the evaluation text, LongTensor (1, length) each, spread evenly over it.

    They overlap where the text is short; of a very long text, only the start is read.
    """
    text = bench.text.evaluation[: 64 * count * length]
    tokens(text, bench.tokenizer, length)  # or it says that the text is too short
    ids = tokens(text, bench.tokenizer).to(bench.model.device)
    room = ids.shape[1] - length
    starts = [room * i // max(1, count - 1) for i in range(count)]
    return [ids[:, start : start + length] for start in starts]


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, cache: Any = None, *, last: int = 0) -> tuple[Tensor, Any]:
    """One forward of token ids (batch, n) onto a cache: logits (batch, n, vocab) in float32, and the cache.

    With `last`, only the logits of the last so many tokens are made, which saves memory on long prompts.
    """
    out = model(ids, **with_cache(cache), use_cache=True, logits_to_keep=last)
    return out.logits.float(), out.past_key_values


def decode(model: PreTrainedModel, ids: Tensor, cache: Any, count: int) -> tuple[Tensor, Any]:
    """Read ids (batch, n) onto a cache and answer greedily: LongTensor (batch, count), and the cache.

    The cache has then seen all of it but the last token.
    """
    answer = []
    for _ in range(count):
        logits, cache = read(model, ids, cache, last=1)
        ids = logits.argmax(-1)
        answer.append(ids)
    return torch.cat(answer, dim=1), cache


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
