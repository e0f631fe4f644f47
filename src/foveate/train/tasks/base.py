"""What a backbone learns and is judged by: tasks whose data are drawn from a seed, as hard as they are asked to be."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias, TypeVar, dataclass_transform

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import Backbone
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.specs import Registry, Spec

C = TypeVar("C", bound=type)
Split: TypeAlias = Literal["train", "validation", "test"]

SHARES = {"train": (2, 10), "validation": (1, 2), "test": (0, 1)}
"""Which tenths of all examples, by a hash of their inputs, belong to which split."""


class Batch(NamedTuple):
    """Examples.

    Attributes:
        inputs: token ids (batch, n), int64, or vectors (batch, n, size), float.
        targets: what each position is to answer, (batch, n), int64, -100 where nothing is asked; of tasks with
            `head = "classes"` (batch,); with `"values"` (batch, n, outputs), float, NaN where nothing is asked.
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class TrainTask(Spec):
    """A task to learn: `"mqar:pairs=8,length=64"`. A task overrides `draw`, and says what goes in and comes out.

    Training and judging never share an example: a hash of the inputs decides which split an example is of, and those
    of other splits are thrown away as they are drawn.

    Class attributes: `about`, a line; `head`, what answers: `lm` (a token at each position), `classes` (one class a
    text) or `values` (numbers at each position); `better`, the metric to look at first; `higher`, whether more of it
    is better.
    """

    about: ClassVar[str]
    head: ClassVar[Literal["lm", "classes", "values"]] = "lm"
    better: ClassVar[str] = "accuracy"
    higher: ClassVar[bool] = True

    @property
    def vocabulary(self) -> int:
        """Tokens that inputs are made of; 0: inputs are vectors."""
        raise NotImplementedError

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers a token: of input vectors (0 for tokens), and of outputs (classes or values; 0 for tokens)."""
        return 0, 0

    @property
    def tokens(self) -> int:
        """Tokens of an example."""
        raise NotImplementedError

    def check(self) -> None:  # noqa: B027 - most tasks have nothing that could be wrong
        """Raise FoveateError where there is nothing to draw from, before anything is trained or written."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """`count` examples at random, of any split, on the generator's device."""

    def batch(self, count: int, split: Split, number: int, device: torch.device, seed: int = 0) -> Batch:
        """The batch of that number: the same for the same arguments, and on one kind of device.

        Args:
            count: examples.
            split: whose.
            number: which batch.
            seed: of the run.
        """
        generator = torch.Generator(device)
        generator.manual_seed(_mixed(seed, number, ("train", "validation", "test").index(split)))
        low, high = SHARES[split]
        found: list[Batch] = []
        for _ in range(1000):
            drawn = self.draw(count if high - low > 5 else 8 * count, generator)
            tenth = hashed(drawn.inputs) % 10
            kept = ((tenth >= low) & (tenth < high)).nonzero().squeeze(1)
            found.append(Batch(drawn.inputs[kept], drawn.targets[kept]))
            if sum(len(each.inputs) for each in found) >= count:
                return Batch(*(torch.cat(parts)[:count] for parts in zip(*found, strict=True)))
        raise FoveateError(f"{self} has too few different examples for the split {split}: make it larger.")

    @torch.no_grad()
    def judge(
        self, model: Backbone, *, split: Split = "test", count: int = 512, batch: int = 64, seed: int = 0
    ) -> dict[str, Metric]:
        """How well a model does on examples that training never saw: means over examples, with intervals.

        Returns:
            `accuracy` (of tokens or classes asked for; not with values) and `loss` (nats, or the squared error).
        """
        training = model.training
        model.eval()
        rows: dict[str, list[float]] = {}
        for number in range(-(-count // batch)):
            drawn = self.batch(min(batch, count - number * batch), split, number, model.device, seed=1_000_003 + seed)
            for name, values in self.scores(self.answers(model, drawn), drawn).items():
                rows.setdefault(name, []).extend(values.tolist())
        model.train(training)
        return {name: mean(values) for name, values in rows.items()}

    def answers(self, model: Backbone, batch: Batch) -> Tensor:
        """The model's logits or values for a batch, in float32."""
        given = {"input_ids" if self.vocabulary else "inputs_embeds": batch.inputs}
        logits: Tensor = model(**given).logits
        return logits.float()

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Figures of each example, (batch,)."""
        if self.head == "values":
            asked = ~batch.targets.isnan()
            errors = (logits - batch.targets.nan_to_num()).square() * asked
            return {"loss": errors.flatten(1).sum(1) / asked.flatten(1).sum(1)}
        if self.head == "classes":
            return {
                "accuracy": (logits.argmax(-1) == batch.targets).float(),
                "loss": functional.cross_entropy(logits, batch.targets, reduction="none"),
            }
        asked = batch.targets != -100
        loss = functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
        right = (logits.argmax(-1) == batch.targets) & asked
        return {"accuracy": right.sum(1) / asked.sum(1), "loss": loss.sum(1) / asked.sum(1)}


TRAIN_TASKS: Registry[TrainTask] = Registry("training task", lambda: None)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def train_task(name: str) -> Callable[[C], C]:
    """Class decorator: register a task to learn under its short name."""
    return TRAIN_TASKS.register(name)


def hashed(inputs: Tensor) -> Tensor:
    """A number of 0 to 2^30 for each row of a batch, the same for equal rows; int64 (batch,)."""
    bits = inputs.flatten(1)
    bits = bits.to(torch.float32).view(torch.int32).long() if bits.is_floating_point() else bits
    weights = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 6364136223846793005 + 1442695040888963407
    # Integers wrap around, the same everywhere.
    total = ((bits + 1) * weights).sum(1)
    total = total ^ (total >> 29)
    return (total * 6364136223846793005 >> 33) & (2**30 - 1)


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers, such that near ones are far apart."""
    seed = 0
    for number in numbers:
        seed = ((seed ^ number) * 6364136223846793005 + 1442695040888963407) % 2**63
    return seed
