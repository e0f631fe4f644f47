"""A saved plan as a method, so that it can stand in a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from foveate.methods import Method, Target, method
from foveate.models.surgery import undone
from foveate.plans import Plan


@method("plan")
class SavedPlan(Method):
    """Cut what a saved plan (`Plan.save`) says. It scores nothing, and fits only the model that it was made for.

    Means that a technique found are not saved, so a plan of `flap` is carried out without its compensation.

    Fields: `file`, the path of the plan.

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

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        plan = Plan.load(self.file)
        target.plans.append(plan)
        with undone(target.model) as surgery:
            plan.carry_out(target.model, surgery)
            yield
