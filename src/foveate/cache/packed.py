"""Entries at rest: ragged over the KV heads, so that what a head does not hold takes no memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foveate.cache.coders.base import Coder


@dataclass
class Entries:
    """The entries of one layer, as attention wants them: every KV head padded to the longest.

    Attributes:
        keys, values: (batch, kv_head, entry, head_dim).
        positions: (batch, kv_head, entry), int32: positions in the text, ascending; -1 = an empty slot, and the empty
            ones come first.
        received: (batch, kv_head, entry), float32, or None.
        key_codes, value_codes: (batch, kv_head, entry, bytes), uint8: the same keys and values as a coder wrote them;
            None without one.
        tier: (batch, kv_head, entry), uint8: how well a coder holds the entry, 0 = best; None where all are alike.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    received: Tensor | None = None
    key_codes: Tensor | None = None
    value_codes: Tensor | None = None
    tier: Tensor | None = None

    def each(self, change: Any) -> Entries:
        """The entries with `change` made to every tensor; batch comes first in all of them, then KV heads."""
        return Entries(*(None if (x := getattr(self, f.name)) is None else change(x) for f in fields(self)))  # type: ignore[arg-type]

    def followed_by(self, more: Entries) -> Entries:
        """These entries and then `more`."""
        pairs = ((getattr(self, f.name), getattr(more, f.name)) for f in fields(self))
        return Entries(*(None if a is None else torch.cat([a, b], dim=2) for a, b in pairs))  # type: ignore[arg-type]

    def take(self, index: Tensor, positions: Tensor) -> Entries:
        """The entries at `index`, int64 (batch, kv_head, entry), and what is at `positions` there."""
        wide = index[..., None]
        taken = self.each(
            lambda x: x.gather(2, index) if x.dim() == 3 else x.gather(2, wide.expand(-1, -1, -1, x.shape[-1]))
        )
        taken.positions = positions
        return taken


@dataclass
class Packed:
    """The same at rest, all KV heads of all sequences one after another.

    With a coder, entries are its codes, but for the first `sinks` tokens of the text, which stay whole. Positions are
    held as runs of consecutive ones in the same tier, or one by one where that is shorter.

    Attributes:
        counts: int32 (batch, kv_head): entries that each KV head holds; `slots`: the most.
        keys, values: (entries of all heads, head_dim); None with a coder.
        key_codes, value_codes: (bytes of the coded entries of all heads), uint8; None without a coder.
        whole: (2, whole entries of all heads, head_dim), keys and values; None without a coder.
        starts, lengths: int32 (runs of all heads): the first position of each run, and how many follow on it.
        positions: int32 (entries of all heads), or None: then runs are held.
        received: float32 (entries of all heads), or None.
        tier: uint8 (runs of all heads), or of their entries where no runs are held; None where all are alike.
    """

    counts: Tensor
    slots: int
    keys: Tensor | None
    values: Tensor | None
    key_codes: Tensor | None
    value_codes: Tensor | None
    whole: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None
    positions: Tensor | None
    received: Tensor | None
    tier: Tensor | None

    @classmethod
    def of(cls, entries: Entries, coder: Coder | None, layer: int) -> Packed:
        live = entries.positions >= 0
        flat = entries.positions[live]
        new_run = torch.ones_like(flat, dtype=torch.bool)
        new_run[1:] = flat[1:] != flat[:-1] + 1
        tier = None if entries.tier is None else entries.tier[live]
        if tier is not None:
            new_run[1:] |= tier[1:] != tier[:-1]
        at = new_run.nonzero()[:, 0]
        in_runs = 2 * len(at) < len(flat)
        keys: Tensor | None = None
        values: Tensor | None = None
        codes: list[Tensor | None] = [None, None]
        whole = None
        if coder is None:
            keys, values = entries.keys[live], entries.values[live]
        else:
            assert entries.key_codes is not None and entries.value_codes is not None  # the layer wrote them
            first = live & (entries.positions < coder.sinks)
            rest = live & ~first
            written = entries.key_codes, entries.value_codes
            masks = _bytes_of(coder, layer, rest, entries.tier, [x.shape[-1] for x in written])
            codes = [x.masked_select(mask) for x, mask in zip(written, masks, strict=True)]
            whole = torch.stack([entries.keys[first], entries.values[first]]).to(coder.whole_dtype)
        return cls(
            counts=live.sum(-1, dtype=torch.int32),
            slots=entries.positions.shape[-1],
            keys=keys,
            values=values,
            key_codes=codes[0],
            value_codes=codes[1],
            whole=whole,
            starts=flat[at] if in_runs else None,
            lengths=at.diff(append=at.new_tensor([len(flat)])).int() if in_runs else None,
            positions=None if in_runs else flat,
            received=None if entries.received is None else entries.received[live],
            tier=tier[at] if in_runs and tier is not None else tier,
        )

    @property
    def live(self) -> Tensor:
        """Which slots of the padded form are filled: bool (batch, kv_head, slots)."""
        slot = torch.arange(self.slots, device=self.counts.device)
        return slot >= self.slots - self.counts[..., None]

    def text_positions(self) -> Tensor:
        """Int32 (batch, kv_head, slots), as in `Entries`."""
        flat = self.positions
        if flat is None:
            assert self.starts is not None and self.lengths is not None  # runs are held
            before = self.lengths.cumsum(0) - self.lengths
            order = torch.arange(int(self.counts.sum()), device=self.counts.device)
            flat = (order + self._of_each(self.starts - before)).int()
        live = self.live
        return torch.full(live.shape, -1, dtype=torch.int32, device=live.device).masked_scatter_(live, flat)

    def _of_each(self, runs: Tensor) -> Tensor:
        """What is held of each run, for each of its entries."""
        return runs if self.lengths is None else runs.repeat_interleave(self.lengths.long())

    def unpack(self, coder: Coder | None, dtype: torch.dtype, layer: int) -> Entries:
        """The padded form, decoded; keys and values are in `dtype`."""
        live, positions = self.live, self.text_positions()

        def spread(flat: Tensor, where: Tensor) -> Tensor:
            out = flat.new_zeros(*where.shape, *flat.shape[1:])
            return out.masked_scatter_(where[(...,) + (None,) * (flat.dim() - 1)], flat)

        received = None if self.received is None else spread(self.received, live)
        tier = None if self.tier is None else spread(self._of_each(self.tier), live)
        if coder is None:
            assert self.keys is not None and self.values is not None  # by `of`
            return Entries(spread(self.keys, live), spread(self.values, live), positions, received, tier=tier)
        assert self.key_codes is not None and self.value_codes is not None and self.whole is not None
        first = live & (positions < coder.sinks)
        rest = live & ~first
        most = [int(x.max()) for x in coder.lengths(layer, None)]
        masks = _bytes_of(coder, layer, rest, tier, most)
        key_codes, value_codes = spread(self.key_codes, masks[0]), spread(self.value_codes, masks[1])
        keys, values = coder.decode(layer, key_codes, value_codes, positions, tier, dtype)
        whole_keys, whole_values = (spread(x.to(dtype), first) for x in self.whole)
        keys = torch.where(first[..., None], whole_keys, keys)
        values = torch.where(first[..., None], whole_values, values)
        return Entries(keys, values, positions, received, key_codes, value_codes, tier)


def _bytes_of(coder: Coder, layer: int, which: Tensor, tier: Tensor | None, most: list[int]) -> list[Tensor]:
    """Which bytes of padded codes are filled, of keys and of values: bool (batch, kv_head, slots, bytes)."""
    lengths = (x.to(which.device)[..., None] for x in coder.lengths(layer, tier))
    return [which[..., None] & (torch.arange(n, device=which.device) < x) for x, n in zip(lengths, most, strict=True)]
