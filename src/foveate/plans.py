"""From scores to what leaves: budgets over units, and plans that say which units of a model stay.

The machine behind every pruner: `UnitScores` -> budget -> `Plan` -> `Plan.carry_out`. A plan is data: it can be
printed, saved, and carried out later on the model that it was made for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from foveate.errors import FoveateError
from foveate.methods import UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.stored import fingerprint
from foveate.models.surgery import KINDS, Means, Surgery, cut, layer_parameters, unit_costs, unit_counts
from foveate.specs import Registry, Spec

C = TypeVar("C", bound=type)

# ---- plans ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which units of a model stay.

    Attributes:
        family: the model's family.
        model: the fingerprint of the model that it is for (`foveate.models.stored.fingerprint`).
        counts: kind -> how many units each layer has (`hidden`: one entry, for all layers).
        keep: kind -> for each layer the units that stay, LongTensor, ascending.
        made_by: the recipe that made it, for people.

    Example:
        >>> import foveate as fv, torch
        >>> from foveate.plans import Plan
        >>> model = fv.tiny("llama", num_hidden_layers=2)
        >>> plan = Plan.of(model, {"channel": [torch.arange(100), torch.arange(128)]})
        >>> Plan.from_json(plan.to_json()).describe()
        'layer 0 keeps 100 of 128 channels'
    """

    family: str
    model: str
    counts: dict[str, list[int]]
    keep: dict[str, list[Tensor]]
    made_by: str = ""
    means: Means | None = field(default=None, repr=False, compare=False)
    """What the units that leave gave on average, where it is to be kept as a constant. Not saved."""
    scores: tuple[UnitScores, ...] = field(default=(), repr=False, compare=False)
    """What it was made from, for the card of a thinned model. Not saved."""

    def __post_init__(self) -> None:
        if "head" in self.keep and "kv_head" in self.keep:
            raise FoveateError("a plan cuts units of the kind head or of the kind kv_head, and not of both: leave one.")

    @classmethod
    def of(
        cls, model: PreTrainedModel, keep: dict[str, list[Tensor]], made_by: str = "", means: Means | None = None
    ) -> Plan:
        """A plan for a model as it is now."""
        counts = {kind: unit_counts(model, kind) for kind in keep}
        ordered = {kind: [kept.cpu() for kept in keep[kind]] for kind in KINDS if kind in keep}
        return cls(anatomy(model).family, fingerprint(model), counts, ordered, made_by, means)

    def check(self, model: PreTrainedModel) -> None:
        """Raise FoveateError unless the plan was made for this model as it is now."""
        family = anatomy(model).family
        if family != self.family or fingerprint(model) != self.model:
            raise FoveateError(
                f"this plan was made for another model ({self.family}, weights {self.model}), and this is a {family} "
                f"with weights {fingerprint(model)}: make a plan for this one, or load the model it was made for."
            )

    def carry_out(self, model: PreTrainedModel, surgery: Surgery) -> None:
        """Cut what does not stay out of a live model.

        Raises:
            FoveateError: made for another model; nothing would be left of a layer's heads or channels.
        """
        self.check(model)
        for kind, keep in self.keep.items():
            # Of a sublayer that has just left as a whole, nothing more can leave.
            there = [kept if count else kept[:0] for kept, count in zip(keep, unit_counts(model, kind), strict=True)]
            cut(model, kind, there, surgery, self.means)

    def describe(self) -> str:
        """In a few words, for people."""
        lines = []
        for kind, keep in self.keep.items():
            changed = [
                (index, len(kept), count)
                for index, (kept, count) in enumerate(zip(keep, self.counts[kind], strict=True))
                if len(kept) < count
            ]
            if kind in ("layer", "attention", "mlp"):
                gone = ", ".join(str(index) for index, _, _ in changed)
                if gone:
                    lines.append(f"{kind} gone: {gone}")
                continue
            if kind == "hidden":
                lines += [f"the residual stream keeps {kept} of {count} channels" for _, kept, count in changed]
                continue
            by_size: dict[tuple[int, int], list[int]] = {}
            for index, kept, count in changed:
                by_size.setdefault((kept, count), []).append(index)
            lines += [
                f"{'layer' if len(indices) == 1 else 'layers'} {', '.join(map(str, indices))} "
                f"{'keeps' if len(indices) == 1 else 'keep'} {kept} of {count} {kind}s"
                for (kept, count), indices in by_size.items()
            ]
        return "; ".join(lines) or "everything stays"

    def table(self) -> Table:
        """What stays in each layer, for a terminal."""
        table = Table(box=SIMPLE_HEAD)
        kinds = [kind for kind in self.keep if kind != "hidden"]
        for title in ("layer", *kinds):
            table.add_column(title, justify="right")
        layers = max((len(self.keep[kind]) for kind in kinds), default=0)
        for index in range(layers):
            cells = [f"{len(self.keep[kind][index])} of {self.counts[kind][index]}" for kind in kinds]
            table.add_row(str(index), *cells)
        table.caption = "what stays"
        if "hidden" in self.keep:
            table.caption += (
                f"; of the residual stream {len(self.keep['hidden'][0])} of {self.counts['hidden'][0]} channels"
            )
        return table

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; units as ranges, such as "0-15,17"."""
        return {
            "foveate_plan": 1,
            "family": self.family,
            "model": self.model,
            "made_by": self.made_by,
            "units": {
                kind: [
                    {"of": count, "keep": _ranges(kept)} for kept, count in zip(keep, self.counts[kind], strict=True)
                ]
                for kind, keep in self.keep.items()
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            FoveateError: it is no plan, or names a kind of unit that there is not.
        """
        if not isinstance(data, dict) or data.get("foveate_plan") != 1:
            raise FoveateError('this is no plan that foveate wrote: it has no "foveate_plan": 1.')
        units = data.get("units", {})
        for kind in units:
            if kind not in KINDS:
                raise FoveateError(f"there is no unit called {kind!r}: there are {', '.join(KINDS)}.")
        try:
            counts = {kind: [int(row["of"]) for row in rows] for kind, rows in units.items()}
            keep = {kind: [_units(row["keep"], int(row["of"])) for row in rows] for kind, rows in units.items()}
            return cls(str(data["family"]), str(data["model"]), counts, keep, str(data.get("made_by", "")))
        except (KeyError, TypeError, ValueError) as error:
            raise FoveateError(f"this plan is damaged ({error}): save it again.") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file, whole or not at all. Means are not saved."""
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise FoveateError(f"the plan can't be written to {path}: {error.strerror}. Give another path.") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a file.

        Raises:
            FoveateError: there is no such file, or it holds no plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise FoveateError(f"the plan {path} can't be read: {error.strerror}.") from error
        except ValueError as error:
            raise FoveateError(f"{path} holds no plan: it is no JSON ({error}).") from error
        return cls.from_json(data)


def _ranges(units: Tensor) -> str:
    runs: list[list[int]] = []
    for unit in units.tolist():
        if runs and unit == runs[-1][1] + 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _units(text: str, count: int) -> Tensor:
    units: list[int] = []
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        units += range(int(first), int(last or first) + 1)
    if units != sorted(set(units)) or (units and units[-1] >= count):
        raise ValueError(f"{text[:40]!r} are no units of {count}")
    return torch.tensor(units, dtype=torch.long)


# ---- budgets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Spread(Spec):
    """How what must leave is spread over layers and kinds of unit.

    Any pruner takes any: `flap:keep=0.8,budget=uniform(floor=0.2)`.

    Fields:
        floor: the fraction of its units of each kind that every layer keeps, in [0, 1).
        multiple: every layer keeps a multiple of so many units of a kind, where it has as many; 1: any number. Kernels
            and formats like multiples of 32 or 64.
    """

    floor: float = 0.0
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise FoveateError(f"{self.name}: floor={self.floor} is outside [0, 1): give a fraction, such as 0.2.")
        if self.multiple < 1:
            raise FoveateError(f"{self.name}: multiple={self.multiple} is below 1: give a number such as 32.")

    def spend(self, scores: Sequence[UnitScores], costs: Sequence[Tensor], cost: float) -> list[Tensor]:
        """What stays when the lowest scores leave, so that what leaves costs about `cost`.

        Args:
            scores: of each kind, (layers, units); NaN = there is no such unit.
            costs: of each kind, what leaves with one unit, float (layers, 1).
            cost: what is to leave in all.

        Returns:
            for each kind, bool (layers, units).
        """
        raise NotImplementedError(f"the budget {self.name} does not override spend")

    def least(self, units: int) -> int:
        """Units of a kind that a layer keeps at least; one, or a head's or a channel's sublayer would be none."""
        return max(1, math.ceil(self.floor * units))


SPREADS: Registry[Spread] = Registry("budget", lambda: None)
Spread.registry = SPREADS


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spread(name: str) -> Callable[[C], C]:
    """Class decorator: register a budget over units under its short name."""
    return SPREADS.register(name)


WHOLE = ("layer", "attention", "mlp")
"""Kinds of which a layer has one, and may have none."""


def _lowest(score: UnitScores, costs: Tensor, cost: float, least: Callable[[int], int]) -> tuple[Tensor, float]:
    """What stays of one kind, bool (layers, units), when the lowest scores leave up to a cost; what that costs."""
    stays, spent = _lowest_of([score], [costs], cost, least)
    return stays[0], spent


def _lowest_of(
    scores: Sequence[UnitScores], costs: Sequence[Tensor], cost: float, least: Callable[[int], int]
) -> tuple[list[Tensor], float]:
    free, prices, values = [], [], []
    for score, price in zip(scores, costs, strict=True):
        there = ~score.scores.isnan()
        # The best few of a layer are not for sale.
        few = torch.tensor([[0 if score.kind in WHOLE else least(int(n))] for n in there.sum(dim=1)])
        rank = score.scores.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        free.append((there & (rank >= few)).flatten())
        prices.append(price.expand_as(score.scores).flatten().double())
        values.append(score.scores.flatten().float())
    sale, price, value = torch.cat(free), torch.cat(prices), torch.cat(values)
    order = value.masked_fill(~sale, torch.inf).argsort(stable=True)[: int(sale.sum())]
    # A unit leaves where more than half of it is still to be paid.
    gone = order[price[order].cumsum(0) - price[order] / 2 < cost]
    stays = torch.ones_like(sale)
    stays[gone] = False
    parts = stays.split([score.scores.numel() for score in scores])
    kept = [part.view_as(score.scores) & ~score.scores.isnan() for part, score in zip(parts, scores, strict=True)]
    return kept, float(price[gone].sum())


def _rounded(stays: Tensor, score: UnitScores, multiple: int, least: Callable[[int], int]) -> Tensor:
    """Each layer's number of units that stay, rounded to the nearest multiple where it has as many.

    Never below the floor, `least`.
    """
    if multiple == 1 or score.kind in WHOLE:
        return stays
    stays = stays.clone()
    values = score.scores.nan_to_num(nan=-torch.inf)
    for row, value, there in zip(stays, values, ~score.scores.isnan(), strict=True):
        count, units = int(row.sum()), int(there.sum())
        if count and count < units and multiple <= units:
            lowest = math.ceil(least(units) / multiple) * multiple
            best = value.topk(min(max(lowest, round(count / multiple) * multiple), units)).indices
            row[:] = False
            row[best] = True
    return stays


@spread("global")
class Global(Spread):
    """The lowest scores of the whole model leave, whatever their layer and kind.

    Scores of different layers and kinds are compared as they are, so they must be comparable.
    """

    def spend(self, scores: Sequence[UnitScores], costs: Sequence[Tensor], cost: float) -> list[Tensor]:
        stays, _ = _lowest_of(scores, costs, cost, self.least)
        return [_rounded(kept, score, self.multiple, self.least) for kept, score in zip(stays, scores, strict=True)]


@spread("per-kind")
class PerKind(Spread):
    """As large a part of every kind leaves; within a kind, the lowest scores of the whole model."""

    def spend(self, scores: Sequence[UnitScores], costs: Sequence[Tensor], cost: float) -> list[Tensor]:
        return _dearest_first(
            scores,
            costs,
            cost,
            lambda score, price, share: _rounded(
                _lowest(score, price, share * _total(score, price), self.least)[0], score, self.multiple, self.least
            ),
        )


@spread("uniform")
class Uniform(Spread):
    """Every layer loses the same number of units of a kind, its own lowest: all layers stay alike.

    So the result is a regular shape, which is saved as a plain architecture.
    """

    def spend(self, scores: Sequence[UnitScores], costs: Sequence[Tensor], cost: float) -> list[Tensor]:
        def same(score: UnitScores, price: Tensor, share: float) -> Tensor:
            there = ~score.scores.isnan()
            if score.kind in WHOLE:
                return _lowest(score, price, share * _total(score, price), self.least)[0]
            stays = torch.zeros_like(there)
            for row, value, mask in zip(stays, score.scores, there, strict=True):
                count = int(mask.sum())
                if count:
                    kept = max(self.least(count), round((1 - share) * count))
                    row[value.nan_to_num(nan=-torch.inf).topk(kept).indices] = True
            return _rounded(stays, score, self.multiple, self.least)

        return _dearest_first(scores, costs, cost, same)


def _total(score: UnitScores, price: Tensor) -> float:
    return float((price * ~score.scores.isnan()).sum())


def _dearest_first(
    scores: Sequence[UnitScores],
    costs: Sequence[Tensor],
    cost: float,
    stays: Callable[[UnitScores, Tensor, float], Tensor],
) -> list[Tensor]:
    """The same share of each kind, beginning with the dearest units: the cheaper make good for what rounding missed."""
    result: dict[int, Tensor] = {}
    left = cost
    order = sorted(range(len(scores)), key=lambda i: -float(costs[i].max()))
    for place, i in enumerate(order):
        rest = sum(_total(scores[j], costs[j]) for j in order[place:])
        share = min(1.0, max(0.0, left / rest)) if rest else 0.0
        result[i] = stays(scores[i], costs[i], share)
        left -= float((costs[i] * (~scores[i].scores.isnan() & ~result[i])).sum())
    return [result[i] for i in range(len(scores))]


# ---- from scores to a plan ------------------------------------------------------------------------------------------


def plan_for(
    model: PreTrainedModel,
    scores: UnitScores | Sequence[UnitScores],
    keep: float,
    budget: Spread,
    *,
    by: str = "parameters",
    who: str = "plan",
) -> Plan:
    """The plan in which the lowest scores leave.

    Args:
        model: the model that was scored.
        scores: of one kind of unit, or of several.
        keep: the fraction that stays: of the parameters in the decoder layers (`by="parameters"`), or of the scored
            units (`by="units"`).
        budget: how what leaves is spread.
        by: what `keep` is a fraction of.
        who: the recipe, for the plan and for errors.

    Raises:
        FoveateError: the scored units are not enough to reach `keep`.

    Example:
        >>> import foveate as fv, torch
        >>> from foveate.methods import UnitScores
        >>> from foveate.plans import Uniform, plan_for
        >>> model = fv.tiny("llama")
        >>> scores = UnitScores("channel", torch.rand(4, 128))
        >>> plan_for(model, scores, 0.9, Uniform()).describe()
        'layers 0, 1, 2, 3 keep 109 of 128 channels'
    """
    scores = [scores] if isinstance(scores, UnitScores) else list(scores)
    for score in scores:
        if score.kind not in KINDS:
            raise FoveateError(f"there is no unit called {score.kind!r}: there are {', '.join(KINDS)}.")
    scores = [UnitScores(score.kind, score.scores.detach().float().cpu()) for score in scores]
    if by == "units":
        costs = [torch.ones(len(score.scores), 1) for score in scores]
        total = sum(_total(score, price) for score, price in zip(scores, costs, strict=True))
    else:
        costs = [torch.tensor(unit_costs(model, score.kind))[:, None] for score in scores]
        total = float(layer_parameters(model))
    cost = (1 - keep) * total
    stays = budget.spend(scores, costs, cost)
    gone = [~kept & ~score.scores.isnan() for kept, score in zip(stays, scores, strict=True)]
    spent = sum(float((price * mask).sum()) for price, mask in zip(costs, gone, strict=True))
    # A unit can be too much by half, and so can what every layer is rounded by.
    # (a layer with fewer units than the multiple is not rounded by it).
    widths = [int((~score.scores.isnan()).sum(dim=1).max()) for score in scores]
    steps = [budget.multiple if width >= budget.multiple else 1 for width in widths]
    slack = sum(float(price.max()) + float(price.sum()) * step / 2 for price, step in zip(costs, steps, strict=True))
    if spent < 0.98 * cost - slack:
        raise FoveateError(
            f"{who}: keep={keep} asks that {cost:.3g} {by} leave, and only {spent:.3g} can: keep more, lower the "
            "budget's floor, or add a technique that cuts other units."
        )
    if by == "units" and not any(bool(kept.any()) for kept in stays):  # one unit stays always
        best = max(range(len(scores)), key=lambda i: float(scores[i].scores.nan_to_num(nan=-torch.inf).max()))
        stays[best].view(-1)[scores[best].scores.nan_to_num(nan=-torch.inf).argmax()] = True
    keeps = {}
    for score, kept in zip(scores, stays, strict=True):
        kept = kept | score.scores.isnan()  # what was not scored (a layer that is skipped) stays, where it is there
        counts = unit_counts(model, score.kind)
        keeps[score.kind] = [row[:count].nonzero().flatten() for row, count in zip(kept, counts, strict=True)]
    return dataclasses.replace(Plan.of(model, keeps, made_by=who), scores=tuple(scores))
