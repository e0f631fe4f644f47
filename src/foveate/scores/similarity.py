"""How alike the attention of two layers is: what `echo` shares by and a probe shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def map_similarity(maps: Sequence[Tensor | None]) -> Tensor:
    """Cosine between the attention weights of every two layers, head by head and query by query; a mean over both.

    Args:
        maps: of each layer (head, query, entry); None: the layer has no attention.

    Returns:
        (layers, layers), float64 on the CPU; NaN where a layer has none, or the shapes differ.

    Example:
        >>> diagonal, even = torch.eye(4)[None], torch.full((1, 4, 4), 0.25)
        >>> map_similarity([diagonal, even, None]).tolist()
        [[1.0, 0.5, nan], [0.5, 1.0, nan], [nan, nan, nan]]
    """
    found = [None if each is None else nn.functional.normalize(each.float(), dim=-1) for each in maps]
    total = torch.full((len(maps), len(maps)), torch.nan, dtype=torch.float64)
    for a, first in enumerate(found):
        for b in range(a, len(found)):
            second = found[b]
            if first is not None and second is not None and first.shape == second.shape:
                total[a, b] = total[b, a] = (first * second).sum(-1).mean().item()
    return total


def head_similarity(first: Tensor, second: Tensor) -> Tensor:
    """The same between every head of one layer and every head of another, (head, query, entry) each: (head, head).

    Example:
        >>> head_similarity(torch.eye(2)[None], torch.eye(2).flip(0)[None].expand(3, 2, 2)).tolist()
        [[0.0, 0.0, 0.0]]
    """
    a, b = (nn.functional.normalize(each.float(), dim=-1).flatten(1) for each in (first, second))
    return (a @ b.T / first.shape[1]).double().cpu()
