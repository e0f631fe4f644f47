"""The depth role: which layers run. A technique plans; leaving layers out and keeping positions right are here."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from foveate.methods import Change, Target
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.surgery import Surgery, unit_counts
from foveate.plans import Plan


def layers_of(parts: Anatomy) -> list[int]:
    """Indices of the layers that are there: those that have neither attention nor MLP any more don't count.

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama", num_hidden_layers=4)
        >>> with fv.apply(model, "skip-layers:keep=0.75"):
        ...     layers_of(fv.anatomy(model))
        [0, 1, 3]
    """
    return [index for index, there in enumerate(unit_counts(parts.model, "layer")) if there]


class DepthPlan(Change):
    """Base of techniques that run the same layers for every token. A technique writes `plan`.

    The other layers leave as a pruner's units do, by a `foveate.plans.Plan`: inside `apply` their weights are gone, and
    back at the end of the block; `fv.thin` leaves them out for good.
    """

    role: ClassVar[str] = "depth"

    @abstractmethod
    def plan(self, parts: Anatomy) -> list[int]:
        """Indices of the layers that run, ascending."""

    def change(self, target: Target, surgery: Surgery) -> None:
        parts = anatomy(target.model)
        run, there = set(self.plan(parts)), layers_of(parts)
        if run.issuperset(there):
            return
        keep = [torch.arange(int(layer.index in run and layer.index in there)) for layer in parts.layers]
        plan = Plan.of(target.model, {"layer": keep}, self.to_text())
        target.plans.append(plan)
        plan.carry_out(target.model, surgery)
