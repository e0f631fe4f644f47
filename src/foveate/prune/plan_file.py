"""A saved plan as a method, so that it can stand in a recipe."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from foveate.methods import Change, Target, method
from foveate.models.surgery import Surgery
from foveate.plans import Plan
from foveate.prune.statistics import means_of


@method("plan")
class SavedPlan(Change):
    """Cut what a saved plan (`Plan.save`) says. It scores nothing, and fits only the model that it was made for.

    Fields:
        file: the path of the plan.
        compensate: whether the mean of what leaves, over calibration text, stays as a bias, as in `flap`.

    Example:
        >>> import foveate as fv, tempfile, torch
        >>> from foveate.plans import Plan
        >>> model = fv.tiny("llama")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Plan.of(model, {"channel": [torch.arange(100)] * 4}).save(f"{folder}/plan.json")
        ...     with fv.apply(model, f"plan:file={folder}/plan.json"):
        ...         model.model.layers[0].mlp.down_proj.in_features
        100
    """

    role: ClassVar[str] = "prune"
    claim: ClassVar[str] = "what was planned before, carried out"

    file: str
    compensate: bool = False

    def change(self, target: Target, surgery: Surgery) -> None:
        plan = Plan.load(self.file)
        if self.compensate:
            plan.check(target.model)  # before any calibration runs
            plan = dataclasses.replace(plan, means=means_of(target.model, target.calibration()))
        target.plans.append(plan)
        plan.carry_out(target.model, surgery)
