"""Tiers: a code for the entries that a policy holds well, and others for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.cache.coders.base import Coder, Coding, coding
from foveate.cache.coders.groups import Groups
from foveate.methods import Target


@coding("tiers")
class Tiers(Coding):
    """Entries of a policy's tier 0 in one code, the others in another, or in two others.

    For policies that tell entries apart: `zipvl` by the attention they received, `aged` by their age.

    Fields:
        best: the code of tier 0.
        middle: the code of tier 1, for policies that know three; none = there are two tiers.
        rest: the code of the last tier.

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
    middle: Coding | None = None
    rest: Coding = Groups(bits=2)

    def coder(self, target: Target) -> Coder:
        codes = (self.best, self.middle, self.rest)
        return TiersCoder([code.coder(target) for code in codes if code is not None])


class TiersCoder(Coder):
    """A coder of each tier; codes are padded to the longest. Without tiers, all entries are in the first."""

    def __init__(self, coders: list[Coder]):
        self.coders = coders
        self.inv_freq = coders[0].inv_freq

    def _each(self, tier: Tensor) -> Iterator[tuple[Coder, Tensor, Tensor]]:
        """Of every tier: its coder, the slots where any head has it (n,), and which do, (batch, kv_head, n, 1)."""
        for place, coder in enumerate(self.coders):
            here = tier == place
            at = here.any(0).any(0).nonzero()[:, 0]
            if place == 0 or len(at):
                yield coder, at, here[:, :, at, None]

    def encode(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, tier: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tier = torch.zeros_like(positions) if tier is None else tier
        most = [int(x.max()) for x in self.lengths(layer, None)]
        codes = [torch.zeros(*tier.shape, n, dtype=torch.uint8, device=keys.device) for n in most]
        for coder, at, here in self._each(tier):
            written = coder.encode(layer, keys[:, :, at], values[:, :, at], positions[:, :, at], None)
            for x, new, n in zip(codes, written, most, strict=True):
                _put(x, at, here, pad(new, (0, n - new.shape[-1])))
        return codes[0], codes[1]

    def decode(
        self,
        layer: int,
        key_codes: Tensor,
        value_codes: Tensor,
        positions: Tensor,
        tier: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        entries: list[Tensor] = []
        for coder, at, here in self._each(torch.zeros_like(positions) if tier is None else tier):
            pair = coder.decode(layer, key_codes[:, :, at], value_codes[:, :, at], positions[:, :, at], None, dtype)
            entries = entries or [x.new_zeros(*positions.shape, x.shape[-1]) for x in pair]
            for x, new in zip(entries, pair, strict=True):
                _put(x, at, here, new)
        return entries[0], entries[1]

    def lengths(self, layer: int, tier: Tensor | None) -> tuple[Tensor, Tensor]:
        each = zip(*(coder.lengths(layer, None) for coder in self.coders), strict=True)
        of_tier = (torch.stack(lengths) for lengths in each)
        if tier is None:  # the most
            keys, values = (x.max() for x in of_tier)
        else:
            keys, values = (x.to(tier.device)[tier.long()] for x in of_tier)
        return keys, values


def _put(x: Tensor, at: Tensor, here: Tensor, new: Tensor) -> None:
    """Write (batch, kv_head, n, any) to the slots `at` of x, `here` only."""
    x[:, :, at] = new if bool(here.all()) else torch.where(here, new, x[:, :, at])
