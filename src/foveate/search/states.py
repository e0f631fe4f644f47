"""What a search walks over: states of a model, and steps from one to the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from foveate.models.surgery import KINDS, Surgery, cut, unit_counts
from foveate.plans import Plan

SUBLAYER = {"attention": "attention", "kv_head": "attention", "mlp": "mlp", "channel": "mlp"}
"""The sublayer that a unit of a kind stands in."""

Place = tuple[int, str]
"""A layer, and a kind of unit or a sublayer in it."""


@dataclass(frozen=True)
class State:
    """What is left of a model.

    Attributes:
        keep: (layer, kind) -> the units that stay, ascending, as the original counts them; only where some left.
        cache: the recipe that the cache follows; "": all entries stay.
        ranks: (layer, sublayer) -> the part of its maps' parameters that stays in two thin factors each.

    Example:
        >>> State({(3, "attention"): ()}).gone(3, "attention")
        True
        >>> State({}, "h2o:keep=0.5", {(0, "mlp"): 0.6, (2, "mlp"): 0.6}).beside
        'low-rank:keep=0.6,maps=mlp,layers=0/2+h2o:keep=0.5'
    """

    keep: Mapping[Place, tuple[int, ...]] = field(default_factory=dict)
    cache: str = ""
    ranks: Mapping[Place, float] = field(default_factory=dict)

    def gone(self, layer: int, sublayer: str) -> bool:
        """Whether a whole sublayer (`attention` or `mlp`) has left."""
        return self.keep.get((layer, sublayer)) == ()

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that tell states apart."""
        # What is left of a sublayer that is gone makes no difference.
        keep = {p: units for p, units in self.keep.items() if not (units and self.gone(p[0], SUBLAYER[p[1]]))}
        text = json.dumps([[*place, units] for place, units in sorted(keep.items())]) + self.beside
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def beside(self) -> str:
        """The recipe of what is no unit, and stands beside the plan: factors, and the cache; "" where nothing is."""
        parts = []
        left = {place: keep for place, keep in self.ranks.items() if not self.gone(*place)}
        for sublayer, keep in sorted({(place[1], keep) for place, keep in left.items()}):
            layers = "/".join(str(i) for (i, which), kept in sorted(left.items()) if (which, kept) == (sublayer, keep))
            parts.append(f"low-rank:keep={keep},maps={sublayer},layers={layers}")
        return "+".join(filter(None, [*parts, self.cache]))

    def plan(self, model: PreTrainedModel, made_by: str) -> Plan:
        """The plan that brings the original into this state."""
        keeps = {}
        for kind in sorted({kind for _, kind in self.keep}, key=list(KINDS).index):
            units = [self.keep.get((i, kind), range(count)) for i, count in enumerate(unit_counts(model, kind))]
            if kind != SUBLAYER[kind]:  # a head leaves with its sublayer
                units = [() if self.gone(i, SUBLAYER[kind]) else kept for i, kept in enumerate(units)]
            keeps[kind] = [torch.tensor([*kept], dtype=torch.long) for kept in units]
        return Plan.of(model, keeps, made_by)


@dataclass(frozen=True)
class Step:
    """One change to a state.

    Attributes:
        axis: the axis that it is a step on.
        name: what leaves, for people; one name is one change, as long as nothing else at its `places` changes.
        changes: what stays at the places where something leaves.
        cache: the recipe of the cache from then on; None: as before.
        ranks: (layer, sublayer) -> the part of the parameters that stays in factors.
    """

    axis: str
    name: str
    changes: Mapping[Place, tuple[int, ...]] = field(default_factory=dict)
    cache: str | None = None
    ranks: Mapping[Place, float] = field(default_factory=dict)

    @property
    def places(self) -> set[Place]:
        """The sublayers that change."""
        return {(layer, SUBLAYER[kind]) for layer, kind in self.changes} | {*self.ranks} or {(-1, "cache")}

    @property
    def first(self) -> int:
        """The first layer that changes; 0 where the cache does."""
        return min((layer for layer, _ in [*self.changes, *self.ranks]), default=0)

    def after(self, state: State) -> State:
        """The state that this step leads to."""
        cache = state.cache if self.cache is None else self.cache
        return State({**state.keep, **self.changes}, cache, {**state.ranks, **self.ranks})


def no_factors(layer: int, sublayer: str, keep: float) -> dict[str, nn.Module]:
    raise ValueError("a state with ranks, and nothing that makes factors")


class Live:
    """A live model that can be brought from state to state; only layers that differ are cut anew.

    So a step costs the slicing of one layer, which is little beside a forward.

    Args:
        model: the original.
        factors: layer, sublayer, keep -> path -> what stands in for a map there.
    """

    def __init__(self, model: PreTrainedModel, factors: Callable[[int, str, float], dict[str, nn.Module]] = no_factors):
        self.model, self.state, self.factors = model, State(), factors
        self._surgeries: dict[int, Surgery] = {}

    def show(self, state: State) -> None:
        """Bring the model into a state (its units; the cache's recipe is whoever runs the model's business)."""
        before, self.state = self.state, state
        changed = {p for p in {**before.keep, **state.keep} if before.keep.get(p) != state.keep.get(p)}
        changed |= {p for p in {**before.ranks, **state.ranks} if before.ranks.get(p) != state.ranks.get(p)}
        for layer in {layer for layer, _ in changed}:
            if layer in self._surgeries:
                self._surgeries[layer].undo()
            surgery = self._surgeries[layer] = Surgery()  # known before anything is cut, as that may be stopped
            for (where, sublayer), part in state.ranks.items():
                if where == layer and not state.gone(layer, sublayer):
                    for path, module in self.factors(layer, sublayer, part).items():
                        surgery.swap(self.model, path, module)
            for kind in KINDS:
                kept = state.keep.get((layer, kind))
                if kept is None or (kept and state.gone(layer, SUBLAYER[kind])):
                    continue
                keep = [torch.arange(count) for count in unit_counts(self.model, kind)]
                keep[layer] = torch.tensor(kept, dtype=torch.long)
                cut(self.model, kind, keep, surgery)

    def restore(self) -> None:
        """Bring the original back, whatever state a change was stopped in."""
        for surgery in self._surgeries.values():
            surgery.undo()
        self._surgeries.clear()
        self.state = State()
