"""Which calibration text a search reads: passages that steps are measured on, and the rest, to rank units on."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import tokens
from foveate.models.anatomy import anatomy

PASSAGE = 512
"""Tokens of a passage, where the text and the model allow as many."""


def passages(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int = PASSAGE
) -> Tensor:
    """About `count` tokens of a text in passages spread evenly over it: (passages, length), on the model's device.

    Raises:
        FoveateError: the text has fewer tokens than that.
    """
    length = min(length, count, anatomy(model).max_positions)
    number = max(1, count // length)
    tokens(text, tokenizer, number * length)  # or it says that the text is too short
    ids = tokens(text, tokenizer)
    starts = _starts(ids.shape[1], number, length)
    return torch.cat([ids[:, start : start + length] for start in starts]).to(model.device)


def _starts(count: int, number: int, length: int) -> list[int]:
    return [(count - length) * i // max(1, number - 1) for i in range(number)]


def rest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, taken: Tensor, count: int) -> Tensor:
    """Up to `count` tokens of a text that stand in none of the passages taken from it: (passages, length).

    Where the text has less than a passage besides, those passages themselves.

    Args:
        taken: what `passages` gave for that text.
    """
    ids = tokens(text, tokenizer)[0]
    left = torch.ones(len(ids), dtype=torch.bool)
    number, width = taken.shape
    for start in _starts(len(ids), number, width):
        left[start : start + width] = False
    ids = ids[left][:count]
    length = min(PASSAGE, anatomy(model).max_positions, count)
    return ids[: len(ids) // length * length].view(-1, length).to(model.device) if len(ids) >= length else taken
