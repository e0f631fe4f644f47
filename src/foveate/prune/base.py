"""The prune role: which units leave. A technique scores and says how a unit goes; the rest is here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from foveate.methods import Method, Target, UnitScores, check_fraction
from foveate.models.anatomy import anatomy
from foveate.models.caches import partial_cache


@dataclass(frozen=True, kw_only=True)
class Pruner(Method):
    """Base of techniques that remove the units that score lowest on calibration text.

    Fields:
        keep: fraction of the units that stay, over the whole model, in (0, 1]; 1 removes nothing and scores nothing.
    """

    role: ClassVar[str] = "prune"

    keep: float

    def __post_init__(self) -> None:
        check_fraction(self.name, self.keep)

    @abstractmethod
    def score(self, model: PreTrainedModel, calibration: Tensor) -> UnitScores:
        """How much each unit matters, on calibration token ids (batch, length)."""

    @abstractmethod
    def removed(self, model: PreTrainedModel, drop: Tensor) -> AbstractContextManager[None]:
        """Context manager: the units marked in `drop`, bool (layers, units), are gone inside."""

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        with ExitStack() as stack:
            if self.keep < 1:
                anatomy(target.model)  # an unknown model is reported before any calibration runs
                scores = self.score(target.model, target.calibration())
                drop = ~scores.keep(self.keep) & ~scores.scores.isnan()
                if drop.any():
                    stack.enter_context(self.removed(target.model, drop))
                    stack.enter_context(partial_cache(target.model))
            yield
