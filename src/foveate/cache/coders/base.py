"""What a coder is: it writes keys and values in fewer bits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Coder(ABC):
    """Writes the keys and values of a model's cache as bytes, token by token.

    Attributes:
        sinks: this many first tokens of the text stay whole, in `whole_dtype`.
    """

    sinks: int = 4
    whole_dtype: torch.dtype = torch.bfloat16

    @abstractmethod
    def encode(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of keys and values, uint8 (batch, kv_head, entry, bytes) each.

        Args:
            layer: index of the layer.
            keys, values: (batch, kv_head, entry, head_dim); keys as the model rotated them.
            positions: (batch, kv_head, entry), int32: positions in the text; -1 = an empty slot: any code will do.
        """

    @abstractmethod
    def decode(
        self, layer: int, key_codes: Tensor, value_codes: Tensor, positions: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """What `encode` wrote, keys and values (batch, kv_head, entry, head_dim), in `dtype`."""
