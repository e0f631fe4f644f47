"""What a budget is: how the entries that a policy may hold are spread over layers and KV heads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar, dataclass_transform

import torch
from torch import Tensor

from foveate.methods import PARTS, Part, Target
from foveate.specs import Registry

if TYPE_CHECKING:
    from foveate.cache.entries import CacheView

C = TypeVar("C", bound=type)

EVERYTHING = torch.inf
"""The weight of a KV head that keeps all of its entries."""


@dataclass(frozen=True, kw_only=True)
class Budget(Part):
    """How a policy's entries are spread; any policy takes any budget: `h2o:keep=0.2,budget=pyramid`.

    A budget gives each KV head a weight; `allot` turns weights into entries, whose mean is the policy's own `keep` or
    `entries`. A technique overrides `weights` where they are known before the text, or `measure` where they come of it.

    Class attributes: `name`; `paper`, None for common knowledge; `claim`, one line: what it is said to do;
    `measured`, whether it overrides `measure`.
    """

    role: ClassVar[str] = "cache"
    field: ClassVar[str] = "budget"
    measured: ClassVar[bool] = False

    def check(self, who: str, keep: float | None) -> None:
        """Raise FoveateError where this budget can't be met at the mean `keep` (None: the policy counts entries)."""

    def weights(self, target: Target, keep: float | None) -> Tensor:
        """Weights of the KV heads, float (layers, kv_heads), 0 or more; `EVERYTHING` = whatever there is."""
        raise NotImplementedError(f"the budget {self.name} overrides neither weights nor measure")

    def measure(self, view: CacheView) -> Tensor:
        """Weights of one layer's KV heads, float (batch, kv_head), once a prompt (or a piece of one) has been read.

        `view.received` is there. Until it has been asked for all layers, nothing is evicted.
        """
        raise NotImplementedError(f"the budget {self.name} overrides neither weights nor measure")


def load_budgets() -> None:
    importlib.import_module("foveate.cache.budgets")


BUDGETS: Registry[Budget] = Registry("budget", load_budgets)
Budget.registry = BUDGETS
PARTS.append(BUDGETS)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def budget(name: str) -> Callable[[C], C]:
    """Class decorator: register a budget under its short name, as a frozen keyword-only dataclass."""
    return BUDGETS.register(name)


def allot(weights: Tensor, mean: int, least: int, most: int) -> Tensor:
    """Entries for each unit, int64 in the shape of `weights`: in proportion to the weights, as far as bounds allow.

    What units with a large weight can't use goes to the others. The sum never exceeds `mean` times the number of
    units, and reaches it but for rounding down.

    Args:
        weights: float, 0 or more; `EVERYTHING` = `most`.
        mean: entries a unit may hold on the average; at least `least`.
        least: entries that every unit has at least.
        most: entries that a unit can use at most.

    Example:
        >>> import torch
        >>> from foveate.cache.budgets import EVERYTHING, allot
        >>> allot(torch.tensor([1.0, 2.0, 3.0]), mean=20, least=5, most=100).tolist()
        [10, 20, 30]
        >>> allot(torch.tensor([EVERYTHING, 1.0, 1.0, 1.0]), mean=40, least=5, most=100).tolist()
        [100, 20, 20, 20]
    """
    if mean >= most:
        return torch.full(weights.shape, most, dtype=torch.int64)
    w = weights.double().clamp(max=1e30)
    if not bool(w.any()):
        w = torch.ones_like(w)
    # The sum of clamp(scale * w) grows with the scale: halve in on the scale at which it is the total.
    low, high, total = 0.0, most / float(w[w > 0].min()), mean * w.numel()
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if float((w * middle).clamp(least, most).sum()) > total:
            high = middle
        else:
            low = middle
    return (w * low + 1e-6).clamp(least, most).floor().long()
