"""Bias compensation: what each sublayer writes on average is brought back to the original's, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.errors import FoveateError
from foveate.heal.base import Heal, HealReport, Job, number, way
from foveate.heal.text import sequences
from foveate.heal.train import last_hidden
from foveate.methods import Paper
from foveate.models.anatomy import Anatomy, LayerParts, anatomy
from foveate.portable.parts import NoAttention, NoMlp

POST_NORMED = ("olmo2", "olmo3")
"""Families with two norms a layer, both after their sublayers."""


@way("bias")
class BiasHeal(Heal):
    """A bias on the last map of each attention and MLP (`o`, `down`), or the constant of a sublayer that left.

    After FLAP (section 3.3), which adds to the bias what the removed channels gave on average. Here it is the
    difference of what student and original write on average: sublayer after sublayer, so that a sublayer's correction
    counts for those behind it. That also makes up for changes other than removed channels, and is ours.

    The student has to have the original's layers and width. Several processes all do the same work.

    Fields:
        tokens: of the text that means are taken over; all of it is in memory at once.
        data: `calibration`, `samples`, the path of a text file, or `hub:NAME`.
        length: tokens of a sequence.

    Example:
        >>> import foveate as fv
        >>> from foveate.heal import heal
        >>> student = fv.tiny("llama", seed=1)
        >>> heal(student, fv.tiny("llama"), "bias:tokens=1k,length=64,data=samples", progress=False).tokens
        1024
        >>> student.model.layers[0].mlp.down_proj.bias.shape
        torch.Size([64])
    """

    paper = Paper(
        "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        2023,
        "https://arxiv.org/abs/2312.11983",
    )
    claim = "a bias makes up for what was removed on average, without training"

    tokens: int | str = "8k"
    data: str = "calibration"
    length: int = 512

    def run(self, job: Job) -> HealReport:
        mine, theirs = anatomy(job.student), anatomy(job.teacher)
        if len(mine.layers) != len(theirs.layers) or mine.hidden != theirs.hidden:
            raise FoveateError(
                f"bias compares sublayers one by one, and the student has {len(mine.layers)} layers, {mine.hidden} "
                f"wide, the original {len(theirs.layers)}, {theirs.hidden} wide: heal with distill."
            )
        places = [_place(layer, attention) for layer in mine.layers for attention in (True, False)]
        count = number(self.tokens, "tokens")
        ids = sequences(job, self.data, count, self.length, count, 0)
        goals = _means(job.teacher, theirs, ids, [p.norm_counts for p in places])
        handles = [p.module.register_forward_hook(_fix(p, goal)) for p, goal in zip(places, goals, strict=True)]
        try:
            with torch.no_grad():
                last_hidden(job.student, ids)
        finally:
            for handle in handles:
                handle.remove()
        job.show.at("heal", 1.0, f"{len(places)} sublayers")
        return HealReport(str(self), tokens=ids.numel())


@dataclass(frozen=True)
class Place:
    """What writes a sublayer's output: the map that gets a bias, or what stands for a sublayer that left.

    `norm_counts`: the goal is what is added after a norm behind the sublayer, not what the map writes: with a constant
    that runs through no norm.
    """

    module: nn.Module
    norm_counts: bool


def _place(layer: LayerParts, attention: bool) -> Place:
    module = layer.attention if attention else (layer.mlp if layer.mlp is not None else layer.down)
    if isinstance(module, NoAttention | NoMlp):
        return Place(module, True)
    last = layer.o if attention else layer.down
    if not (hasattr(last, "bias") and hasattr(last, "weight")):
        raise FoveateError(
            f"bias needs a map at the end of each sublayer that takes a bias, and layer {layer.index} has a "
            f"{type(last if last is not None else module).__name__} there: heal with distill or lora."
        )
    assert last is not None
    return Place(last, False)


def _means(model: PreTrainedModel, parts: Anatomy, ids: Tensor, after_norm: list[bool]) -> list[Tensor]:
    """What each sublayer of the original writes on average, float32 (hidden), attention and MLP in turn."""
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[index] = output.float().flatten(0, -2).mean(0)

        return hook

    handles = []
    for index, after in enumerate(after_norm):
        layer, attention = parts.layers[index // 2], index % 2 == 0
        norm = _norm_behind(layer, attention, parts.family) if after else None
        module = norm if norm is not None else layer.o if attention else layer.down
        if module is None:
            raise FoveateError(f"bias reads what the original's layer {index // 2} writes, and its maps aren't known.")
        handles.append(module.register_forward_hook(keep(index)))
    try:
        with torch.no_grad():
            last_hidden(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in range(len(after_norm))]


def _norm_behind(layer: LayerParts, attention: bool, family: str) -> nn.Module | None:
    """The norm on a sublayer's output, before it is added; most families have none."""
    norms = list(layer.norms.values())
    if len(norms) == 4:  # before and after each
        return norms[1] if attention else norms[3]
    return (norms[0] if attention else norms[1]) if family in POST_NORMED else None


def _fix(place: Place, goal: Tensor) -> Callable[..., Any]:
    """A forward hook that sets the bias by what comes out, and puts it right at once, for those behind."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(module, NoAttention | NoMlp):
            if module.value is None:
                module.size = len(goal)
                module.value = nn.Parameter(goal.to(inputs_dtype(inputs, output), copy=True))
            else:
                module.value.copy_(goal)
            new = module.value.to(inputs_dtype(inputs, output))
            return (new, *output[1:]) if isinstance(output, tuple) else new
        missing = goal - output.float().flatten(0, -2).mean(0)
        if module.bias is None:
            weight = module.weight
            module.bias = nn.Parameter(torch.zeros_like(goal, dtype=weight.dtype), requires_grad=weight.requires_grad)
        module.bias += missing.to(module.bias.dtype)
        return output + missing.to(output.dtype)

    return hook


def inputs_dtype(inputs: tuple[Any, ...], output: Any) -> torch.dtype:
    """The dtype of the residual stream, by what went in or came out."""
    like = output[0] if isinstance(output, tuple) else output
    dtype: torch.dtype = like.dtype
    return dtype
