"""The prune role: which units leave. A technique scores them; budgets, plans and surgery are shared."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.methods import Change, Target, UnitScores, check_fraction
from foveate.models.anatomy import anatomy
from foveate.models.surgery import Means, Surgery
from foveate.plans import Global, Plan, Spread, plan_for


@dataclass(frozen=True, kw_only=True)
class Pruner(Change):
    """Base of techniques that cut the units that score lowest on calibration text. A technique writes `score`.

    Fields:
        keep: the fraction that stays, over the whole model, in (0, 1]; 1 removes nothing and scores nothing. Of the
            parameters in the decoder layers, or of the scored units where the technique's `by` is "units".
        budget: how what leaves is spread over layers and kinds of unit: `global`, `uniform` or `per-kind`.

    Class attributes: `by`; `reads`, whether `score` looks at calibration text (else it is given none).
    """

    role: ClassVar[str] = "prune"
    by: ClassVar[str] = "parameters"
    reads: ClassVar[bool] = True

    keep: float
    budget: Spread = Global()

    def __post_init__(self) -> None:
        check_fraction(self.name, self.keep)

    @abstractmethod
    def score(self, model: PreTrainedModel, calibration: Tensor) -> UnitScores | Sequence[UnitScores]:
        """How much each unit matters, of one kind or of several, on calibration token ids (batch, length)."""

    def means(self, model: PreTrainedModel, calibration: Tensor) -> Means | None:
        """What units gave on average, where what leaves is to leave that behind as a constant; None: nothing."""
        return None

    def plan(self, target: Target) -> Plan:
        """What stays and what leaves, on the model as it is now."""
        anatomy(target.model)  # an unknown model is reported before any calibration runs
        calibration = target.calibration() if self.reads else torch.empty(1, 0, dtype=torch.long)
        scores = self.score(target.model, calibration)
        plan = plan_for(target.model, scores, self.keep, self.budget, by=self.by, who=self.to_text())
        return dataclasses.replace(plan, means=self.means(target.model, calibration))

    def change(self, target: Target, surgery: Surgery) -> None:
        if self.keep < 1:
            plan = self.plan(target)
            target.plans.append(plan)
            plan.carry_out(target.model, surgery)
