"""What a search is to reach: an amount that can be read off a live model in any state, and its target."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.errors import FoveateError
from foveate.measure.clock import alternated, timed
from foveate.models.anatomy import anatomy
from foveate.models.surgery import cut, layer_parameters, undone, unit_counts
from foveate.tasks.base import decode, read

AXES_OF = {
    "params": ["attention", "mlp", "layer", "kv_head", "channel", "rank"],
    "speed": ["attention", "mlp", "layer", "kv_head", "channel"],
    "memory": ["attention", "mlp", "layer", "kv_head", "channel", "rank", "cache"],
}
"""The axes that a goal is searched on, where no others are asked for."""


class Goal(ABC):
    """Class attributes: `name`; `axis`, the amount in words. `drawn_as`, a chart's axis. Attributes: `target`,
    the amount to come down to."""

    name: ClassVar[str]
    axis: ClassVar[str]
    drawn_as: ClassVar[str]
    target: float

    @abstractmethod
    def amount(self, model: PreTrainedModel, share: float = 1.0) -> float:
        """What a live model costs as it is now, where the cache keeps a share of its entries."""

    @abstractmethod
    def words(self, amount: float) -> str:
        """An amount, for people."""

    def drawn(self, amount: float) -> float:
        """An amount as charts show it, on an axis called `drawn_as`."""
        return amount


@dataclass(frozen=True)
class Params(Goal):
    """The share of the parameters in the decoder layers that stays.

    Attributes:
        target: in (0, 1).
        whole: parameters in the original's layers.
    """

    name: ClassVar[str] = "params"
    axis: ClassVar[str] = "parameters in the layers"
    drawn_as: ClassVar[str] = "parameters in the layers that stay"

    target: float
    whole: int

    @classmethod
    def of(cls, model: PreTrainedModel, target: float) -> Params:
        if not 0 < target < 1:
            raise FoveateError(
                f"params={target} is outside (0, 1): give the share of the parameters in the layers that is to stay, "
                "such as 0.8."
            )
        return cls(target, layer_parameters(model))

    def amount(self, model: PreTrainedModel, share: float = 1.0) -> float:
        return layer_parameters(model) / self.whole

    def words(self, amount: float) -> str:
        return f"{amount:.1%}"


@dataclass(frozen=True)
class Memory(Goal):
    """Bytes of the weights, and of the cache at a context length.

    Attributes:
        target: bytes.
        context: tokens in the cache.
    """

    name: ClassVar[str] = "memory"
    axis: ClassVar[str] = "memory"
    drawn_as: ClassVar[str] = "MiB of weights and cache"

    target: float
    context: int

    @classmethod
    def of(cls, model: PreTrainedModel, target: int | str, context: int) -> Memory:
        size = byte_count(target)
        if context < 1:
            raise FoveateError(
                f"context={context} is below 1: give the tokens that the cache is to hold, such as 2048."
            )
        return cls(size, context)

    def amount(self, model: PreTrainedModel, share: float = 1.0) -> float:
        parts = anatomy(model)
        heads = _counted(model, "kv_head", "attention")
        entry = 2 * parts.head_dim * model.dtype.itemsize
        windows = [min(self.context, (layer.sliding_window or self.context + 1) - 1) for layer in parts.layers]
        held = sum(count * window for count, window in zip(heads, windows, strict=True))
        return sum(p.nbytes for p in model.parameters()) + share * held * entry

    def words(self, amount: float) -> str:
        return byte_words(amount)

    def drawn(self, amount: float) -> float:
        return amount / 2**20


def _counted(model: PreTrainedModel, kind: str, sublayer: str) -> list[int]:
    """Units of each layer; an error where a sublayer runs that has none to count: what it costs isn't known then."""
    units = unit_counts(model, kind)
    for layer, (there, count) in enumerate(zip(unit_counts(model, sublayer), units, strict=True)):
        if there and not count:
            raise FoveateError(
                f"the {sublayer} of layer {layer} was converted, and what it costs can't be told from its units: give "
                "the goal params, or leave the conversion out."
            )
    return units


UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def byte_count(text: int | str) -> float:
    """Bytes, from a number or a text.

    Example:
        >>> byte_count("1.5MiB")
        1572864.0
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmg]?i?b)?\s*", str(text).lower())
    try:
        size = float(match[1]) * UNITS[match[2] or "b"] if match else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if not size > 0:
        raise FoveateError(f"memory={text} is no size: give bytes, or a size such as 300MiB or 4GiB.")
    return size


def byte_words(size: float) -> str:
    """A size for people.

    Example:
        >>> byte_words(1572864)
        '1.5 MiB'
    """
    for unit, of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= of:
            return f"{size / of:.4g} {unit}"
    return f"{size:.0f} bytes"


@dataclass(frozen=True)
class Times:
    """Seconds that parts of a model take on this machine, of one prefill or of one decoded token.

    Attributes:
        rest: embedding, head, and all that is in no sublayer.
        attention, mlp: of a sublayer, whatever its width.
        kv_head, channel: of each unit of its width, besides.
    """

    rest: float
    attention: float
    kv_head: float
    mlp: float
    channel: float

    def of(self, model: PreTrainedModel) -> float:
        """Seconds predicted for a live model as it is now."""
        counts = {kind: unit_counts(model, kind) for kind in ("attention", "mlp")}
        counts |= {kind: _counted(model, kind, of) for kind, of in (("kv_head", "attention"), ("channel", "mlp"))}
        return self.rest + sum(getattr(self, kind) * sum(each) for kind, each in counts.items())


PHASES = ("decode", "prefill")
PROMPT, TOKENS = 512, 16
"""Tokens read before a decode is timed, or in a prefill; tokens decoded. The same in the measurement at the end."""


@dataclass(frozen=True)
class Speed(Goal):
    """The time that the model takes, predicted from measured times of its parts, against the original's.

    Attributes:
        target: 1 over the speed-up.
        times: seconds of the parts.
        whole: predicted seconds of the original.
        phase: `decode` or `prefill`.
    """

    name: ClassVar[str] = "speed"
    axis: ClassVar[str] = "predicted speed"
    drawn_as: ClassVar[str] = "times as fast, by prediction"

    target: float
    times: Times
    whole: float
    phase: str

    @classmethod
    def of(cls, model: PreTrainedModel, speed: float, phase: str, times: Times) -> Speed:
        return cls(1 / speed, times, times.of(model), phase)

    @staticmethod
    def check(speed: float, phase: str) -> None:
        if not speed > 1:
            raise FoveateError(f"speed={speed} is not above 1: give how many times as fast it is to be, such as 1.5.")
        if phase not in PHASES:
            raise FoveateError(f"there is no phase {phase!r}: give {' or '.join(PHASES)}.")

    def amount(self, model: PreTrainedModel, share: float = 1.0) -> float:
        return self.times.of(model) / self.whole

    def words(self, amount: float) -> str:
        return f"{1 / amount:.2f} times as fast"

    def drawn(self, amount: float) -> float:
        return 1 / amount


@torch.no_grad()
def measure_times(
    model: PreTrainedModel, ids: Tensor, phase: str, *, repeats: int = 3, progress: Callable[[float], None]
) -> Times:
    """Time the model whole, and with some of its parts cut out of all layers: the differences are the parts' times.

    Args:
        model: as it is.
        ids: token ids (1, length), `PROMPT` of them or fewer.
        phase: `decode` or `prefill`.
        repeats: rounds that count, after one to warm up; each times all variants, forwards and backwards by turns.
    """
    counts = {kind: unit_counts(model, kind) for kind in ("attention", "kv_head", "mlp", "channel")}
    first = next((i for i, n in enumerate(counts["attention"]) if n), 0)  # stays: else nothing counts positions
    variants: list[tuple[str, Callable[[int, int], int]]] = [
        ("", lambda i, n: n),
        ("attention", lambda i, n: n if i == first else 0),
        ("mlp", lambda i, n: 0),
        ("kv_head", lambda i, n: min(n, 1)),
        ("channel", lambda i, n: (n + 1) // 2),
    ]
    sides = [partial(_seconds, model, ids, phase, kind, kept, counts) for kind, kept in variants]
    rounds = [sorted(seconds)[repeats // 2] for seconds in alternated(sides, repeats, progress)]
    whole, *without = rounds
    each = {}
    for (kind, kept), seconds in zip(variants[1:], without, strict=True):
        gone = sum(n - kept(i, n) for i, n in enumerate(counts[kind]))
        each[kind] = max(0.0, whole - seconds) / gone if gone else 0.0
    for sublayer, unit in (("attention", "kv_head"), ("mlp", "channel")):
        width = sum(counts[unit]) / max(1, sum(counts[sublayer]))
        each[unit] = min(each[unit], each[sublayer] / width) if width else 0.0
        each[sublayer] -= width * each[unit]
    inside = sum(each[kind] * sum(counts[kind]) for kind in counts)
    return Times(max(0.0, whole - inside), each["attention"], each["kv_head"], each["mlp"], each["channel"])


def _seconds(
    model: PreTrainedModel,
    ids: Tensor,
    phase: str,
    kind: str,
    kept: Callable[[int, int], int],
    counts: dict[str, list[int]],
) -> float:
    with undone(model) as surgery:
        if kind:
            cut(model, kind, [torch.arange(kept(i, n)) for i, n in enumerate(counts[kind])], surgery)
        prefill, out = timed(lambda: read(model, ids, last=1), model.device)
        if phase == "prefill":
            return prefill
        logits, cache = out
        answer: tuple[float, Any] = timed(lambda: decode(model, logits.argmax(-1), cache, TOKENS), model.device)
        return answer[0] / TOKENS
