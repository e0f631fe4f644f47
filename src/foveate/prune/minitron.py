"""Minitron: the same share of channels, heads, residual stream or layers leaves, as activations say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.errors import FoveateError
from foveate.methods import Paper, Target, UnitScores, method
from foveate.models.anatomy import anatomy
from foveate.models.surgery import unit_costs, unit_counts
from foveate.plans import Plan, Spread, Uniform
from foveate.prune.base import Pruner
from foveate.prune.statistics import inputs_of, norm_outputs, sublayer_change
from foveate.specs import nearest
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

AXES = {
    "depth": ("layer",),
    "heads": ("kv_head",),
    "channels": ("channel",),
    "hidden": ("hidden",),
    "width": ("channel", "hidden"),
}
"""What `axes` may name, and the kinds of unit that it cuts; the coarser kinds come first."""


@method("minitron")
class Minitron(Pruner):
    """Cut one or several axes of the whole model by activations on calibration text, to a regular shape.

    Importance, as in the paper's section 2: an MLP channel's is the mean size of its activation; a head's is the norm
    of its output (here of all query heads of a KV head, summed); a channel's of the residual stream, its mean size
    behind the norms, summed over them; a layer's, its block importance: one minus the cosine of what goes in and what
    comes out. All come from forward passes only. Every layer stays alike, and each axis loses the same share, such
    that `keep` is met. The paper searches the shares of the axes, and retrains by distillation; neither is done here.

    Fields:
        keep: the fraction of the parameters in the decoder layers that stays. Where the residual stream is cut, the
            embeddings shrink with it.
        axes: what is cut: `depth`, `heads`, `channels`, `hidden`, or several, as in `depth/channels`; `width` is
            `channels/hidden`, attention heads staying as they are.
        budget: `uniform` and no other; its `multiple` is for the widths.

    Example:
        >>> import foveate as fv, torch
        >>> model, text = fv.tiny("llama"), torch.arange(1, 65).unsqueeze(0)
        >>> with fv.apply(model, "minitron:keep=0.8,axes=channels/hidden,budget=uniform(multiple=8)", calibration=text):
        ...     model.model.layers[0].mlp
        LlamaMLP(
          (gate_proj): Linear(in_features=56, out_features=112, bias=False)
          (up_proj): Linear(in_features=56, out_features=112, bias=False)
          (down_proj): Linear(in_features=112, out_features=56, bias=False)
          (act_fn): SiLUActivation()
        )
    """

    paper: ClassVar[Paper | None] = Paper(
        "Compact Language Models via Pruning and Knowledge Distillation", 2024, "https://arxiv.org/abs/2407.14679"
    )
    claim: ClassVar[str] = "activations on a little text say which channels, heads and layers can leave"

    budget: Spread = Uniform()
    axes: str = "width"

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis in self.axes.split("/"):
            if axis not in AXES:
                raise FoveateError(f"minitron: there is no axis called {axis!r}: {nearest(axis, AXES)}")
        if not isinstance(self.budget, Uniform):
            raise FoveateError(
                f"minitron: budget={self.budget.name} was asked for, but it keeps all layers alike: leave the budget, "
                "or prune by flap or wanda."
            )

    @property
    def kinds(self) -> list[str]:
        """The kinds of unit that are cut, the coarsest first."""
        named = {kind for axis in self.axes.split("/") for kind in AXES[axis]}
        return [kind for kind in ("layer", "kv_head", "channel", "hidden") if kind in named]

    def score(self, model: PreTrainedModel, calibration: Tensor) -> Sequence[UnitScores]:
        inputs = inputs_of(model, calibration)
        found = []
        for kind in self.kinds:
            counts = unit_counts(model, kind)
            if kind == "layer":
                scores = sublayer_change(model, calibration)["layer"]
            elif kind == "hidden":
                scores = norm_outputs(model, calibration).float()[None]
            else:
                scores = torch.full((len(counts), max(counts)), torch.nan)
                for (index, role), seen in inputs.items():
                    if kind == "channel" and role == "down":
                        scores[index, : counts[index]] = seen.size.float()
                    if kind == "kv_head" and seen.head_norm is not None:
                        scores[index, : counts[index]] = seen.head_norm.view(counts[index], -1).sum(dim=1).float()
            found.append(UnitScores(kind, scores))
        return found

    def plan(self, target: Target) -> Plan:
        anatomy(target.model)  # an unknown model is reported before any calibration runs
        shares = self.shares(target.model)  # and so is a keep that can't be met
        keep: dict[str, list[Tensor]] = {}
        scores = self.score(target.model, target.calibration())
        for score in scores:
            counts, share = unit_counts(target.model, score.kind), shares[score.kind]
            if score.kind == "layer":
                stays = score.scores.nan_to_num(nan=torch.inf).flatten().topk(round(share * len(counts))).indices
                keep["layer"] = [torch.arange(count if i in stays else 0) for i, count in enumerate(counts)]
                continue
            keep[score.kind] = [
                # What was not scored, in a layer that does not run, counts most.
                row[:count].nan_to_num(nan=torch.inf).topk(self._rounded(share, count)).indices.sort().values
                for row, count in zip(score.scores, counts, strict=True)
            ]
        return dataclasses.replace(Plan.of(target.model, keep, made_by=self.to_text()), scores=tuple(scores))

    def shares(self, model: PreTrainedModel) -> dict[str, float]:
        """The share of each kind of unit that stays, so that `keep` of the layers' parameters does.

        Raises:
            FoveateError: these axes can't reach it.
        """
        attention, mlp = sum(unit_costs(model, "attention")), sum(unit_costs(model, "mlp"))
        shares = dict.fromkeys(("layer", "kv_head", "channel", "hidden"), 1.0)

        def kept(part: float, free: list[str]) -> float:
            s = {**shares, **dict.fromkeys(free, part)}
            return s["layer"] * s["hidden"] * (attention * s["kv_head"] + mlp * s["channel"]) / (attention + mlp)

        free = self.kinds
        while free:  # what rounding the coarser axes missed, the finer make good
            low, high = 0.0, 1.0
            while high - low > 1e-9:
                middle = (low + high) / 2
                low, high = (low, middle) if kept(middle, free) > self.keep else (middle, high)
            kind, *free = free
            units = len(anatomy(model).layers) if kind == "layer" else max(unit_counts(model, kind))
            if not units:
                raise FoveateError(
                    f"minitron: this model has no units of the kind {kind} that could be cut: name other axes, or "
                    "prune a model before its parts are converted."
                )
            count = max(1, round(high * units)) if kind == "layer" else self._rounded(high, units)
            step = 1 if kind == "layer" else self.budget.multiple
            shares[kind] = count / units
            if free and kept(1.0, free) < self.keep:  # the finer can take away, but not give back
                shares[kind] = min(1.0, (count + step) / units)
        reached = kept(1.0, [])
        part, shares[kind] = shares[kind], min(1.0, shares[kind] + step / units)
        slack = abs(kept(1.0, []) - reached) / 2 + 1e-9  # half a step of the finest axis, in parameters
        shares[kind] = part
        if abs(reached - self.keep) > 0.02 + slack:
            raise FoveateError(
                f"minitron: keep={self.keep} can't be met by the axes {self.axes}, which come to {reached:.2f} at "
                "best: keep more, or name more axes."
            )
        return shares

    def _rounded(self, share: float, count: int) -> int:
        """Units that stay of so many: at least the floor, and a multiple."""
        multiple = self.budget.multiple
        most = max(self.budget.least(count), round(share * count / multiple) * multiple) if count else 0
        return min(count, most)


@claim("minitron")
class ActivationsSayWhatCanGo(Claim):
    statement: ClassVar[str] = (
        "importance from activations on a small calibration set finds which channels and layers can leave (section 2; "
        "that width beats depth, the paper finds after retraining, and this experiment does not retrain)"
    )
    setting: ClassVar[str] = (
        "keep=0.9 of the parameters in the layers, scored on 2,048 tokens of calibration text; 2,048 tokens of "
        "evaluation text; channels and layers, each against the same shape at random; hidden and channels beside them"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, chunk=128), of=6)
        full = streams.read("full")
        metrics, checks = {"perplexity, whole model": full.perplexity}, {}
        for axes in ("channels", "depth"):
            scored, random = streams.read(Minitron(keep=0.9, axes=axes)), streams.read(_Random(keep=0.9, axes=axes))
            metrics[f"over whole: {axes} by activations"] = scored.over(full)
            metrics[f"over whole: {axes} at random"] = random.over(full)
            checks[f"{axes}: better than at random"] = scored.below(random)
        metrics["over whole: channels and hidden by activations"] = streams.read(Minitron(keep=0.9)).over(full)
        return Finding(metrics, checks)


@dataclass(frozen=True, kw_only=True)
class _Random(Minitron):
    """The control, for the claim: the same shape, its units drawn at random."""

    def score(self, model: PreTrainedModel, calibration: Tensor) -> Sequence[UnitScores]:
        generator = torch.Generator().manual_seed(0)
        counts = {kind: unit_counts(model, kind) for kind in self.kinds}
        return [UnitScores(k, torch.rand(len(c), max(c), generator=generator)) for k, c in counts.items()]
