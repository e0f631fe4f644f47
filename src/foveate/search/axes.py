"""The axes of a search: each says which steps there are from a state. A new one is a class with `steps`."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.convert.low_rank import bases_on, factors
from foveate.convert.maps import ROLES, LinearMap, linear_maps
from foveate.errors import FoveateError
from foveate.methods import Recipe
from foveate.models.anatomy import anatomy
from foveate.models.surgery import has_mlp, unit_counts
from foveate.plans import Uniform
from foveate.search.states import SUBLAYER, Place, State, Step
from foveate.specs import nearest


class Axis(ABC):
    """One way to make a model cost less, step by step.

    Class attributes: `name`; `words`, what leaves, for people.
    """

    name: ClassVar[str]
    words: ClassVar[str]

    def __init__(self, model: PreTrainedModel, calibration: Tensor):
        """Args: the model as it is, and token ids (batch, length) that an axis may rank its units on.

        Where the text has enough, no step is measured on it: factors, say, fit the tokens that they were made of
        better than others.
        """
        self.model = model

    @abstractmethod
    def steps(self, state: State) -> list[Step]:
        """The steps that can be taken from a state."""


class Sublayers(Axis):
    """Whole sublayers of one kind; the last one stays."""

    def __init__(self, model: PreTrainedModel, calibration: Tensor):
        self.there = [i for i, count in enumerate(unit_counts(model, self.name)) if count]

    def steps(self, state: State) -> list[Step]:
        left = [i for i in self.there if not state.gone(i, self.name)]
        return [Step(self.name, f"{self.name} {i}", {(i, self.name): ()}) for i in left] if len(left) > 1 else []


class AttentionAxis(Sublayers):
    name = "attention"
    words = "attention sublayers"


class MlpAxis(Sublayers):
    name = "mlp"
    words = "MLP sublayers"


class LayerAxis(Axis):
    """Whole layers: both sublayers at once, where both are there."""

    name = "layer"
    words = "whole layers"

    def __init__(self, model: PreTrainedModel, calibration: Tensor):
        counts = zip(unit_counts(model, "attention"), unit_counts(model, "mlp"), strict=True)
        self.there = [i for i, both in enumerate(counts) if all(both)]

    def steps(self, state: State) -> list[Step]:
        left = [i for i in self.there if not (state.gone(i, "attention") or state.gone(i, "mlp"))]
        if len(left) <= 1:
            return []
        return [Step(self.name, f"layer {i}", {(i, "attention"): (), (i, "mlp"): ()}) for i in left]


class KvHeadAxis(Axis):
    """KV heads, each with the query heads that it serves; the last one of a layer stays."""

    name = "kv_head"
    words = "KV heads with their query heads"

    def __init__(self, model: PreTrainedModel, calibration: Tensor):
        self.counts = unit_counts(model, "kv_head")

    def steps(self, state: State) -> list[Step]:
        steps = []
        for i, count in enumerate(self.counts):
            left = state.keep.get((i, "kv_head"), tuple(range(count)))
            if len(left) > 1 and not state.gone(i, "attention") and (i, "attention") not in state.ranks:
                steps += [
                    Step(self.name, f"kv_head {i}.{head}", {(i, "kv_head"): tuple(h for h in left if h != head)})
                    for head in left
                ]
        return steps


RANKED = 4
"""Passages that neurons are ranked on."""


class ChannelAxis(Axis):
    """A twelfth of an MLP's neurons at a time, those that matter least first; the last twelfth stays."""

    name = "channel"
    words = "groups of MLP neurons"

    def __init__(self, model: PreTrainedModel, calibration: Tensor):
        scores = channel_scores(model, calibration[:RANKED])
        self.order = [None if row is None else row.argsort().tolist() for row in scores]  # least first
        self.groups = [
            0 if row is None else max(1, (len(row) // 12) // 32 * 32 or len(row) // 12) for row in self.order
        ]

    def steps(self, state: State) -> list[Step]:
        steps = []
        for i, (order, group) in enumerate(zip(self.order, self.groups, strict=True)):
            if order is None or state.gone(i, "mlp") or (i, "mlp") in state.ranks:
                continue
            left = state.keep.get((i, "channel"), range(len(order)))
            if len(left) > group:
                kept = tuple(sorted(order[len(order) - len(left) + group :]))
                steps.append(Step(self.name, f"channel {i}: {len(kept)} of {len(order)} stay", {(i, "channel"): kept}))
        return steps


UNITS = {sublayer: [kind for kind, of in SUBLAYER.items() if of == sublayer] for sublayer in ROLES}
"""The kinds of unit that stand in a sublayer."""
RANKS = (0.8, 0.6, 0.4, 0.25)
"""The parts of its maps' parameters that a sublayer can come down to."""


class RankAxis(Axis):
    """The part of a sublayer's linear maps that stays, as two thin factors each; for sublayers that are not cut.

    The factors are those of `low-rank`, made of what maps read in the original. The answer's recipe makes them anew, of
    what they read in the model that it cuts.
    """

    name = "rank"
    words = "ranks of a sublayer's linear maps"

    def __init__(self, model: PreTrainedModel, calibration: Tensor):
        super().__init__(model, calibration)
        self.maps: dict[Place, list[LinearMap]] = {}
        for layer, sublayer in itertools.product(range(len(anatomy(model).layers)), ROLES):
            with suppress(FoveateError):  # it has left, or was converted
                self.maps[layer, sublayer] = linear_maps(anatomy(model), sublayer, self.name, {layer})
        self.bases = bases_on(model, [each for maps in self.maps.values() for each in maps], calibration)

    def steps(self, state: State) -> list[Step]:
        steps = []
        for layer, sublayer in self.maps:
            if state.gone(layer, sublayer) or any((layer, kind) in state.keep for kind in UNITS[sublayer]):
                continue
            part = next((part for part in RANKS if part < state.ranks.get((layer, sublayer), 1)), None)
            if part is not None:
                steps.append(Step(self.name, f"rank {sublayer} {layer}: {part}", ranks={(layer, sublayer): part}))
        return steps

    def factors(self, layer: int, sublayer: str, keep: float) -> dict[str, nn.Module]:
        """Path -> the factors of a sublayer's maps."""
        return factors(self.maps[layer, sublayer], self.bases, keep, Uniform())


NOTCHES = (0.75, 0.5, 0.35, 0.25, 0.18, 0.12)
POLICIES = ("streaming", "h2o")


class CacheAxis(Axis):
    """The share of cache entries that stays, by each of a few policies."""

    name = "cache"
    words = "cache entries"

    def __init__(self, model: PreTrainedModel, calibration: Tensor):
        pass

    def steps(self, state: State) -> list[Step]:
        lower = [notch for notch in NOTCHES if notch < cache_share(state.cache)]
        return [
            Step(self.name, f"cache {policy}:keep={lower[0]}", cache=f"{policy}:keep={lower[0]}")
            for policy in POLICIES
            if lower
        ]


def cache_share(recipe: str) -> float:
    """The share of its entries that a cache keeps under a recipe.

    Example:
        >>> cache_share("streaming:keep=0.5"), cache_share("")
        (0.5, 1.0)
    """
    return float(getattr(Recipe.of(recipe).methods[0], "keep", 1.0)) if recipe else 1.0


AXES: dict[str, type[Axis]] = {
    axis.name: axis for axis in (AttentionAxis, MlpAxis, LayerAxis, KvHeadAxis, ChannelAxis, RankAxis, CacheAxis)
}
"""All axes by name."""


def chosen_axes(names: list[str]) -> list[type[Axis]]:
    """The axes of these names.

    Raises:
        FoveateError: there is no such axis, or none was named.
    """
    for name in names:
        if name not in AXES:
            raise FoveateError(f"there is no axis called {name!r}: {nearest(name, AXES)}")
    if not names:
        raise FoveateError(f"no axis was named: give one or more of {', '.join(AXES)}.")
    return [AXES[name] for name in dict.fromkeys(names)]


def channel_scores(model: PreTrainedModel, calibration: Tensor) -> list[Tensor | None]:
    """How much each MLP neuron matters, float32 (neurons) a layer; None where a layer has no MLP.

    The sum over tokens of (a * dL/da)^2, where a is what the neuron gives to the down projection, and L the loss on
    labels that are drawn from the model's own predictions. That is the diagonal of the Fisher information of a gate
    on each neuron: half of it is the KL divergence that closing the gate costs, to second order.

    Args:
        calibration: token ids (batch, length).
    """
    parts = anatomy(model)
    layers = {layer.index: layer for layer in parts.layers if has_mlp(layer)}
    scores: list[Tensor | None] = [None for _ in parts.layers]
    generator = torch.Generator(model.device).manual_seed(0)
    for ids in calibration.split(1):
        seen: dict[int, Tensor] = {}
        with ExitStack() as hooks, torch.enable_grad():
            for index, layer in layers.items():

                def enter(
                    module: nn.Module, args: tuple[Any, ...], index: int = index, seen: dict[int, Tensor] = seen
                ) -> tuple[Any, ...]:
                    given = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
                    seen[index] = given
                    return (given, *args[1:])

                assert layer.down is not None
                hooks.callback(layer.down.register_forward_pre_hook(enter).remove)
            logits = model(ids, use_cache=False).logits[0].float()
            labels = logits.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            slopes = torch.autograd.grad(loss, list(seen.values()))
        for (index, given), slope in zip(seen.items(), slopes, strict=True):
            score = (given.detach().float() * slope.float()).square().flatten(0, -2).sum(0).cpu()
            before = scores[index]
            scores[index] = score if before is None else before + score
    return scores
