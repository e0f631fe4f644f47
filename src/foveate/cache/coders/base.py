"""What a coder is: it writes keys and values in fewer bits, token by token."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar, dataclass_transform

import torch
from torch import Tensor

from foveate.cache.attend import rotate
from foveate.methods import PARTS, Part, Target
from foveate.models.anatomy import Anatomy, anatomy
from foveate.specs import Registry

C = TypeVar("C", bound=type)


class Coder(ABC):
    """Writes the keys and values of one model's cache as bytes. What it holds is the model's, the same for all texts.

    Attributes:
        inv_freq: of each layer, as `Anatomy.inv_freq` gives them: keys are coded as they were before they were rotated,
            when they don't depend on positions. None where positions are not rotary: as they are.
        sinks: this many first tokens of the text stay whole, in 16 bits.
    """

    inv_freq: list[Tensor | None]
    sinks: int = 4
    whole_dtype: torch.dtype = torch.bfloat16

    def __init__(self, parts: Anatomy):
        static = parts.rotary_is_static
        self.inv_freq = [parts.inv_freq(layer.index) if static else None for layer in parts.layers]

    def turned_back(self, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys as they were before they were rotated to their positions, float32 or wider."""
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        inv_freq = self.inv_freq[layer]
        return keys if inv_freq is None else rotate(keys, -positions.clamp(min=0), inv_freq)

    def turned(self, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
        """The opposite."""
        inv_freq = self.inv_freq[layer]
        return keys if inv_freq is None else rotate(keys, positions.clamp(min=0), inv_freq)

    @abstractmethod
    def encode(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, tier: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Codes of keys and of values, uint8 (batch, kv_head, entry, bytes) each; bytes beyond an entry's length: any.

        Args:
            layer: index of the layer.
            keys, values: (batch, kv_head, entry, head_dim); keys as the model rotated them.
            positions: (batch, kv_head, entry), int32: positions in the text; -1 = an empty slot: any code will do.
            tier: (batch, kv_head, entry), uint8, of a policy that holds some entries better than others: 0 = best.
        """

    @abstractmethod
    def decode(
        self,
        layer: int,
        key_codes: Tensor,
        value_codes: Tensor,
        positions: Tensor,
        tier: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """What `encode` wrote, keys and values (batch, kv_head, entry, head_dim), in `dtype`."""

    @abstractmethod
    def lengths(self, layer: int, tier: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bytes of an entry's key and of its value, int64, broadcastable to (batch, kv_head, entry)."""


@dataclass(frozen=True, kw_only=True)
class Coding(Part):
    """How entries are written, the field `code` of every policy: `h2o:keep=0.2,code=groups(bits=4)`.

    Class attributes: `name`; `paper`, None for common knowledge; `claim`, one line: what it is said to do.
    """

    role: ClassVar[str] = "cache"
    field: ClassVar[str] = "code"

    def coder(self, target: Target) -> Coder:
        """The coder for a model, calibrated where it needs to be."""
        raise NotImplementedError(f"the coding {self.name} makes no coder")


def load_codings() -> None:
    importlib.import_module("foveate.cache.coders")


CODINGS: Registry[Coding] = Registry("coding", load_codings)
Coding.registry = CODINGS
PARTS.append(CODINGS)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def coding(name: str) -> Callable[[C], C]:
    """Class decorator: register a coding under its short name, as a frozen keyword-only dataclass."""
    return CODINGS.register(name)


@torch.no_grad()
def calibration_entries(
    target: Target, length: int = 1024, texts: int = 2
) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor]]:
    """The entries that the model makes of calibration text, piece by piece.

    Args:
        target: what is calibrated on.
        length: tokens of a piece; fewer where the model has fewer positions.
        texts: pieces.

    Yields:
        keys and values of each layer (1, kv_head, entry, head_dim), keys as the model rotated them, and their positions
        (1, 1, entry), int64. A layer with a window of its own has the last entries only.
    """
    length = min(length, anatomy(target.model).max_positions)
    for ids in target.calibration(length * texts).split(length, dim=1):
        cache = target.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        held = [layer.keys for layer in cache.layers]
        at = torch.arange(ids.shape[1], device=ids.device)[None, None]
        yield held, [layer.values for layer in cache.layers], at


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Numbers below 2**bits, (..., n) with n * bits a multiple of 8, as bytes: uint8 (..., n * bits / 8).

    Example:
        >>> import torch
        >>> from foveate.cache.coders.base import pack_bits, unpack_bits
        >>> pack_bits(torch.tensor([1, 2, 3, 0]), 2).tolist()
        [57]
        >>> unpack_bits(torch.tensor([57], dtype=torch.uint8), 2).tolist()
        [1, 2, 3, 0]
    """
    if bits == 8:
        return numbers.to(torch.uint8)
    each = (numbers[..., None].to(torch.uint8) >> torch.arange(bits, device=numbers.device, dtype=torch.uint8)) & 1
    eights = each.flatten(-2).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, device=numbers.device, dtype=torch.uint8)
    return (eights * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """What `pack_bits` packed: int64 (..., n)."""
    if bits == 8:
        return packed.long()
    each = (packed[..., None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    weights = 2 ** torch.arange(bits, device=packed.device)
    return (each.flatten(-2).unflatten(-1, (-1, bits)) * weights).sum(-1)
