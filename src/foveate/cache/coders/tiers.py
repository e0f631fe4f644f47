"""Tiers: two codes, one for entries that a policy holds well and one for the rest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.cache.coders.base import Coder, Coding, coding
from foveate.cache.coders.groups import Groups
from foveate.methods import Target


@coding("tiers")
class Tiers(Coding):
    """Entries of a policy's tier 0 in one code, the others in another.

    For policies that tell entries apart: `zipvl` by the attention they received, `aged` by their age.

    Fields:
        best: the code of tier 0.
        rest: the code of the others.

    Example:
        >>> import foveate as fv, torch
        >>> model, prompt = fv.tiny("llama"), torch.arange(3, 103).unsqueeze(0)
        >>> code = "tiers(best=groups(bits=4,group=16),rest=groups(bits=2,group=16))"
        >>> with fv.apply(model, f"aged:fresh=10,code={code}", calibration=prompt):
        ...     out = model(prompt, use_cache=True)
        >>> out.past_key_values.layers[0].padded.tier[0, 0].tolist() == [1] * 90 + [0] * 10
        True
    """

    claim: ClassVar[str] = "bits where they matter: some entries well, the rest barely"

    best: Coding = Groups(bits=4)
    rest: Coding = Groups(bits=2)

    def coder(self, target: Target) -> Coder:
        return TiersCoder(self.best.coder(target), self.rest.coder(target))


class TiersCoder(Coder):
    """Two coders; codes are padded to the longer."""

    def __init__(self, best: Coder, rest: Coder):
        self.best, self.rest = best, rest
        self.inv_freq = best.inv_freq

    def encode(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, tier: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        best = self.best.encode(layer, keys, values, positions, None)
        most = [int(x.max()) for x in self.lengths(layer, None)]
        first = [pad(x, (0, n - x.shape[-1])) for x, n in zip(best, most, strict=True)]
        if tier is None:
            return first[0], first[1]
        rest = self.rest.encode(layer, keys, values, positions, None)
        second = [pad(x, (0, n - x.shape[-1])) for x, n in zip(rest, most, strict=True)]
        low = tier[..., None] > 0
        return torch.where(low, second[0], first[0]), torch.where(low, second[1], first[1])

    def decode(
        self,
        layer: int,
        key_codes: Tensor,
        value_codes: Tensor,
        positions: Tensor,
        tier: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        best = self.best.decode(layer, key_codes, value_codes, positions, None, dtype)
        if tier is None:
            return best
        rest = self.rest.decode(layer, key_codes, value_codes, positions, None, dtype)
        low = tier[..., None] > 0
        return torch.where(low, rest[0], best[0]), torch.where(low, rest[1], best[1])

    def lengths(self, layer: int, tier: Tensor | None) -> tuple[Tensor, Tensor]:
        pairs = zip(self.best.lengths(layer, None), self.rest.lengths(layer, None), strict=True)
        if tier is None:  # the most
            keys, values = (torch.maximum(best, rest) for best, rest in pairs)
        else:
            device = tier.device
            keys, values = (torch.where(tier > 0, rest.to(device), best.to(device)) for best, rest in pairs)
        return keys, values
