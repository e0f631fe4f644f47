"""Random eviction: the control of every other policy."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView
from foveate.errors import FoveateError
from foveate.methods import method


@method("random")
class Random(CachePolicy):
    """Keep a uniform sample of all tokens so far, another one for each layer and KV head.

    Each entry draws a fixed lot from its position, head, layer and `seed`, and the highest lots stay: at any time the
    entries held are a uniform sample of the tokens seen, and the same run gives the same sample.

    Fields: those of `CachePolicy`; `seed`.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "random:entries=8"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> out.past_key_values.layers[0].held()[0].tolist()
        [8, 8]
    """

    claim: ClassVar[str] = "the control: a policy that is no better than this has learnt nothing"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise FoveateError(f"random: seed={self.seed} is negative: give 0 or more.")

    def score(self, view: CacheView) -> Tensor:
        head = torch.arange(view.positions.shape[1], device=view.positions.device)[:, None]
        x = view.positions.long() + 1_000_003 * (head + 1) + 7_368_787 * (view.layer + 1) + 15_485_863 * self.seed
        for _ in range(3):  # a xorshift-multiply hash of 31 bits
            x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        return x.float()
