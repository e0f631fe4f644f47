"""Linear maps and embeddings in a few bits a weight, with parameters of their own for every block of weights.

This file travels with saved models: torch is all it needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# ---- integers in bytes ------------------------------------------------------------------------------------------


def _fields(bits: int) -> list[int]:
    """The widths, each a divisor of 8, into which an integer of so many bits is split: 3 -> [2, 1]."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers below 2**bits, uint8 (rows, columns), columns a multiple of 8, as bytes (rows, columns * bits / 8).

    Example:
        >>> codes = torch.arange(8, dtype=torch.uint8).view(1, 8)
        >>> pack(codes, 3).shape, unpack(pack(codes, 3), 3).tolist()
        (torch.Size([1, 3]), [[0, 1, 2, 3, 4, 5, 6, 7]])
    """
    parts = []
    for width in _fields(bits):
        each = (codes & (2**width - 1)).unflatten(1, (-1, 8 // width))
        packed = each[..., 0]
        for i in range(1, 8 // width):
            packed = packed | (each[..., i] << (i * width))
        parts.append(packed)
        codes = codes >> width if width < 8 else codes
    return torch.cat(parts, dim=1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The integers that `pack` put into bytes (rows, bytes): uint8 (rows, bytes * 8 / bits)."""
    columns = packed.shape[1] * 8 // bits
    codes, start, low = None, 0, 0
    for width in _fields(bits):
        size = columns * width // 8
        part = packed[:, start : start + size]
        if width < 8:
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
            part = ((part[..., None] >> shifts) & (2**width - 1)).flatten(1)
        codes = part if codes is None else codes | (part << low)
        start, low = start + size, low + width
    assert codes is not None
    return codes


# ---- tables -----------------------------------------------------------------------------------------------------


class BlockwiseTable(nn.Module):
    """Numbers (rows, columns), each a code of `bits` bits; number = low + code * step, with the block's low and step.

    A block is a run of `block` numbers in a row; the last of a row is padded. All that is stored are integers, so that
    no change of a model's dtype touches it: a step and a low are float16 numbers, kept as the int16 of the same bits.
    With `shift` a step is a power of two, kept as its exponent, int8, and there is no low: codes lie around zero.

    Args:
        rows, columns: of the table.
        bits: bits of a code, 1 to 8.
        block: numbers in a block, a multiple of 8; None: the whole table is one block.
        shift: whether steps are powers of two.
    """

    packed: Tensor
    step: Tensor
    low: Tensor | None

    def __init__(self, rows: int, columns: int, bits: int, block: int | None, shift: bool):
        super().__init__()
        self.rows, self.columns, self.bits, self.block, self.shift = rows, columns, bits, block, shift
        width = 8 if block is None else block
        padded = -(-columns // width) * width
        blocks = (1, 1) if block is None else (rows, padded // block)
        self.register_buffer("packed", torch.empty(rows, padded * bits // 8, dtype=torch.uint8))
        self.register_buffer("step", torch.empty(blocks, dtype=torch.int8 if shift else torch.int16))
        self.register_buffer("low", None if shift else torch.empty(blocks, dtype=torch.int16))

    def numbers(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """The table's numbers (rows, columns), or those of some rows, in a floating-point type."""
        packed, step, low = self.packed, self.step, self.low
        if rows is not None:
            packed = packed[rows]
            if self.block is not None:
                step, low = step[rows], None if low is None else low[rows]
        codes = unpack(packed, self.bits).float()
        if low is None:
            steps = torch.exp2(step.float())
            lows = -(2 ** (self.bits - 1)) * steps
        else:
            steps, lows = step.view(torch.float16).float(), low.view(torch.float16).float()
        blocked = codes.unflatten(1, (steps.shape[1], -1))
        return torch.addcmul(lows[..., None], blocked, steps[..., None]).flatten(1)[:, : self.columns].to(dtype)


class BlockwiseLinear(BlockwiseTable):
    """A linear map whose weight is quantised block by block, along its inputs. The bias is as it was.

    Args:
        in_features, out_features: widths.
        bits, block, shift: see `BlockwiseTable`.
        bias: whether there is one.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, block: int | None, shift: bool, bias: bool):
        super().__init__(out_features, in_features, bits, block, shift)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def settings(self) -> dict[str, Any]:
        how = {"bits": self.bits, "block": self.block, "shift": self.shift, "bias": self.bias is not None}
        return {"in_features": self.in_features, "out_features": self.out_features, **how}

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.numbers(x.dtype), self.bias)


class BlockwiseEmbedding(BlockwiseTable):
    """An embedding whose table is quantised block by block; only the rows that are looked up are made whole.

    Args:
        num_embeddings, embedding_dim: rows and columns.
        bits, block, shift: see `BlockwiseTable`.
        scale: what rows are multiplied by (the Gemmas have such a number).
    """

    _like: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, bits: int, block: int | None, shift: bool, scale: float = 1.0
    ):
        super().__init__(num_embeddings, embedding_dim, bits, block, shift)
        self.num_embeddings, self.embedding_dim, self.scale = num_embeddings, embedding_dim, scale
        self.register_buffer("_like", torch.empty(0), persistent=False)  # tells the model's dtype

    @property
    def settings(self) -> dict[str, Any]:
        how = {"bits": self.bits, "block": self.block, "shift": self.shift, "scale": self.scale}
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, **how}

    def forward(self, ids: Tensor) -> Tensor:
        dtype = self._like.dtype
        rows = self.numbers(dtype, ids.flatten()).unflatten(0, ids.shape)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=dtype, device=rows.device)


class BlockwiseHead(nn.Module):
    """Logits by the table of a quantised embedding, for models that tie the two.

    Args:
        table: the path of the embedding, in the model.
    """

    def __init__(self, table: str):
        super().__init__()
        self.table = table
        self._table: tuple[Any, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        return {"table": self.table}

    def tie(self, model: nn.Module) -> None:
        self._table = (model.get_submodule(self.table),)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._table[0].numbers(x.dtype))
