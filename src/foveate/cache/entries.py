"""The entries that a policy holds of a layer: its keys, values and positions; and what a policy sees of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from foveate.cache.attend import rotate
from foveate.cache.packed import Entries, Packed

if TYPE_CHECKING:
    from foveate.cache.base import CachePolicy
    from foveate.cache.coders.base import Coder


@dataclass(frozen=True)
class Received:
    """Which attention weights an entry's `received` sums: over the query heads of its group, and over queries.

    Attributes:
        forget: a weight counts by `forget` to the power of the queries that came since; 1 = all alike.
        last: only about the last so many queries count. Of a forward of at least so many tokens, exactly these;
            in shorter ones, what was there fades by 1/last with each token.
    """

    forget: float = 1.0
    last: int | None = None

    def weights(self, age: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Of a forward: the weights of its queries, and of what was received before; float32, broadcast together.

        Args:
            age: (batch or 1, query), int: the real queries of the forward that come after each.
            new: (batch or 1, 1), int: real queries in all.
        """
        if self.last is not None:
            return (age < self.last).float(), (1 - new / self.last).clamp(min=0)
        forget = torch.tensor(self.forget, dtype=torch.float32, device=age.device)
        return forget**age, forget**new


@dataclass
class CacheView:
    """What a policy sees of one layer when it scores.

    Attributes:
        layer: index of the layer.
        keys, values: (batch, kv_head, entry, head_dim), in the model's dtype; keys as the model rotated them.
        positions: (batch, kv_head, entry), int32: positions in the text, ascending; -1 = an empty slot.
        received: (batch, kv_head, entry), float32: attention each entry received so far, summed as the policy's
            `received()` says; None where it says None.
        seen: (batch, 1, 1), int: tokens of each sequence so far, padding not counted.
        query: (batch, head, query, head_dim): the queries of this forward, as the model rotated them.
        query_positions: (batch, query), int64: their positions in the text.
        valid: (batch, query), bool: False for padding among them; None = no padding.
        inv_freq: (rotary_dim / 2,): the radians a position with which the model rotated keys and queries, as
            `attend.rotate` takes them; None where positions are not rotary.
        state: what the policy keeps of this layer from forward to forward, by name: tensors with batch first.
    """

    layer: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    received: Tensor | None
    seen: Tensor
    query: Tensor
    query_positions: Tensor
    valid: Tensor | None
    inv_freq: Tensor | None
    state: dict[str, Tensor]


NO_LIMIT = 1 << 40
"""Stands for the entries of a KV head that may hold any number: beyond any length."""


@dataclass
class Limits:
    """Entries that each KV head may hold, by layer: int64 (batch, kv_head, 1), and the least and most of each layer."""

    of: list[Tensor]
    least: list[int]
    most: list[int]

    @classmethod
    def from_table(cls, table: Tensor, device: torch.device) -> Limits:
        """From int64 (layer, batch, kv_head), on the CPU."""
        flat = table.flatten(1)
        return cls(list(table[..., None].to(device)), flat.amin(1).tolist(), flat.amax(1).tolist())

    @property
    def any(self) -> bool:
        return min(self.least) < NO_LIMIT

    def lifted(self) -> Limits:
        """As many without any limit."""
        none = [NO_LIMIT] * len(self.of)
        return Limits([torch.full_like(limit, NO_LIMIT) for limit in self.of], none, none)


@dataclass
class Step:
    """One forward.

    Attributes:
        new: tokens a sequence, padding included.
        start, end: (batch, 1, 1), int64: real tokens of each sequence before and after.
        positions: (batch, new), int64: the tokens' positions in the text.
        valid: (batch, new), bool: False for padding; None = no padding.
        limits: what each KV head may hold after; None: that is known only when all layers have been measured.
        gain: float32 (batch or 1, new), the weight of each query's attention in what entries receive; None = 1, and
            `fade`: float32 (batch or 1, 1, 1), the weight of what was received before.
        waiting: where limits are not known yet, what each layer's eviction will need.
    """

    new: int
    start: Tensor
    end: Tensor
    positions: Tensor
    valid: Tensor | None
    limits: Limits | None
    gain: Tensor | None
    fade: Tensor | None
    waiting: list[tuple[PolicyLayer, CacheView, int | None]] = field(default_factory=list)


class PolicyLayer(CacheLayerMixin):
    """The entries of one layer: padded while the layer is at work; packed in between, where that is smaller."""

    entries: Entries | Packed | None
    state: dict[str, Tensor]
    seen: int
    dense: bool
    """There are no empty slots."""
    thinned: bool
    """Something has been evicted."""

    def __init__(self, index: int, policy: CachePolicy, coder: Coder | None):
        self.index, self.policy, self.coder = index, policy, coder
        self.reset()

    @property
    def padded(self) -> Entries | None:
        """The entries in their padded form; None before the first forward."""
        if isinstance(self.entries, Packed):
            return self.entries.unpack(self.coder, self.dtype, self.index)
        return self.entries

    @property
    def keys(self) -> Any:  # type: ignore[override]
        """(batch, kv_head, entry, head_dim); None before the first forward, as are the next three."""
        return None if self.entries is None else self.padded.keys  # type: ignore[union-attr]

    @property
    def values(self) -> Any:  # type: ignore[override]
        return None if self.entries is None else self.padded.values  # type: ignore[union-attr]

    @property
    def positions(self) -> Any:
        if isinstance(self.entries, Packed):
            return self.entries.text_positions()
        return None if self.entries is None else self.entries.positions

    @property
    def received(self) -> Any:
        return None if self.entries is None else self.padded.received  # type: ignore[union-attr]

    def held(self) -> Tensor:
        """Entries that each KV head holds: int (batch, kv_head)."""
        if isinstance(self.entries, Packed):
            return self.entries.counts
        return torch.zeros(1, 1, dtype=torch.int64) if self.entries is None else (self.entries.positions >= 0).sum(-1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, kv_heads = key_states.shape[:2]
        empty = torch.empty(batch, kv_heads, 0, dtype=torch.int32, device=key_states.device)
        self.entries = Entries(
            key_states[:, :, :0],
            value_states[:, :, :0],
            empty,
            None if self.policy.watches() is None else empty.float(),
        )
        if self.coder is not None:
            self.entries.key_codes, self.entries.value_codes = self.coder.encode(
                self.index, self.entries.keys, self.entries.values, empty, None
            )
            if self.policy.tiers:
                self.entries.tier = empty.to(torch.uint8)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, step: Step) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Append; eviction follows the attention."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        self.dense = self.dense and step.valid is None
        new = step.positions if step.valid is None else step.positions.masked_fill(~step.valid, -1)
        new = new[:, None].expand(*key_states.shape[:3]).to(key_states.device, torch.int32)
        old = self.padded
        assert old is not None  # initialised
        added = Entries(key_states, value_states, new)
        if old.received is not None:
            added.received = torch.zeros_like(new, dtype=torch.float32)
        if self.coder is not None:
            added.key_codes, added.value_codes = self.coder.encode(self.index, key_states, value_states, new, None)
            added.tier = None if old.tier is None else torch.zeros_like(new, dtype=torch.uint8)
        self.entries = old.followed_by(added)
        return self.entries.keys, self.entries.values

    def moved_keys(self, step: Step, inv_freq: Tensor) -> Tensor:
        """The keys, renumbered by their place in the cache as seen from the tokens just appended.

        Distances are all that rotary attention sees: the new tokens stay where they are, the others move up to them.
        """
        keys, positions = self.working.keys, self.working.positions
        live = positions >= 0
        rank = live.cumsum(-1) - 1
        before = live[..., : -step.new].sum(-1, keepdim=True)
        shift = step.start.to(live.device) - before + rank - positions
        return rotate(keys, shift.masked_fill(~live, 0), inv_freq)

    @property
    def working(self) -> Entries:
        """The entries, while a forward is at work on them."""
        assert isinstance(self.entries, Entries)  # from `update` to `evict`
        return self.entries

    def view(self, step: Step, query: Tensor, inv_freq: Tensor | None) -> CacheView:
        e = self.working
        device = query.device
        return CacheView(
            self.index,
            e.keys,
            e.values,
            e.positions,
            e.received,
            step.end.to(device),
            query,
            step.positions.to(device),
            None if step.valid is None else step.valid.to(device),
            inv_freq,
            self.state,
        )

    def receive(self, received: Tensor, step: Step) -> None:
        """Add what the entries received in this forward, float32 (batch, kv_head, entry)."""
        e = self.working
        assert e.received is not None  # it is only made where it is wanted
        received = received.detach()
        e.received = received + (e.received if step.fade is None else e.received * step.fade)

    def reads(self, step: Step, query: Tensor, inv_freq: Tensor | None) -> Tensor | None:
        """Which entries the policy attends to, as its `reads` says; None = all. They are counted in `read`."""
        read = None
        if step.new == 1 and step.limits is not None:
            read = self.policy.reads(
                self.view(step, query, inv_freq), step.limits.of[self.index], step.limits.most[self.index]
            )
        count = ((self.working.positions if read is None else read) >= 0).sum(-1)
        self.state["read"] = self.state["read"] + count if "read" in self.state else count
        return read

    @property
    def read(self) -> Tensor:
        """Of a policy that does not evict: entries that each KV head read so far, int64 (batch, kv_head).

        A forward reads an entry once, however many tokens it has.
        """
        return self.state.get("read", torch.zeros(1, 1, dtype=torch.int64))

    def receive_part(self, received: Tensor, read: Tensor, step: Step) -> None:
        """As `receive`, of the entries at `read`, for the sequences that read all; the others stay as they are."""
        e = self.working
        assert e.received is not None  # it is only made where it is wanted
        before = e.received
        whole = ((read >= 0).sum(-1) == (e.positions >= 0).sum(-1)).all(-1)
        at = read.clamp(min=0)
        self.receive(torch.zeros_like(before).scatter_add(-1, at, received.masked_fill(read < 0, 0)), step)
        e.received = torch.where(whole[:, None, None], e.received, before)

    def finish(self, step: Step, query: Tensor, inv_freq: Tensor | None, sliding_window: int | None) -> None:
        """The layer has attended: let the policy look, and evict."""
        view = self.view(step, query, inv_freq)
        self.policy.observe(view)
        if step.limits is None:
            step.waiting.append((self, view, sliding_window))
        else:
            self.evict(view, step.limits, sliding_window)

    def evict(self, view: CacheView, limits: Limits, sliding_window: int | None) -> None:
        """Keep as many entries as the limits allow, and none that the layer's own window hides from the next token."""
        if not self.policy.evicts:
            limits = limits.lifted()
        self._evict(view, limits, sliding_window)
        if self.policy.tiers and self.coder is not None:
            self._lower(view)
        ragged = limits.least[self.index] != limits.most[self.index] and self.thinned
        if self.coder is not None or ragged:
            self.entries = Packed.of(self.working, self.coder, self.index)

    def _evict(self, view: CacheView, limits: Limits, sliding_window: int | None) -> None:
        positions, policy = view.positions, self.policy
        slots, least = positions.shape[-1], limits.least[self.index]
        most = min(limits.most[self.index], slots)
        if sliding_window is not None:
            most = min(most, sliding_window)
        if slots <= min(least, most):
            return
        limit = limits.of[self.index][:, : positions.shape[1]]  # a thinned model's layer may have fewer KV heads
        score = policy.score(view).float()
        recent = torch.minimum((limit * policy.recent).long(), limit - policy.sinks).clamp(min=1)
        score = score.masked_fill(positions >= view.seen - recent, torch.finfo(torch.float32).max)
        score = score.masked_fill(positions < policy.sinks, torch.inf)
        hidden = positions < 0
        if sliding_window is not None:
            hidden = hidden | (positions <= view.seen - sliding_window)
        score = score.masked_fill(hidden, -torch.inf)
        if self.dense and sliding_window is None and slots == most + 1 == least + 1:
            # In decoding: one goes, the rest close up.
            index = torch.arange(most, device=score.device)
            index = index + (index >= score.argmin(dim=-1, keepdim=True))
            kept = self.working.take(index, positions.gather(-1, index))
        else:
            best = score.topk(most, dim=-1)
            empty = (torch.arange(most, device=score.device) >= limit) | (best.values == -torch.inf)
            at = positions.gather(-1, best.indices).masked_fill(empty, -1)
            at, order = at.sort(dim=-1)  # empty slots first, then in the text's order
            index = best.indices.gather(-1, order)
            kept = self.working.take(index, at)
            self.dense = self.dense and sliding_window is None and least == limits.most[self.index]
        if policy.merges:
            self._merge(view, kept, index, hidden)
        self.entries = kept
        self.thinned = True

    def _lower(self, view: CacheView) -> None:
        """Write again, in fewer bits, what the policy puts on a lower tier; nothing comes back up."""
        e = self.working
        assert self.coder is not None and e.tier is not None and e.key_codes is not None and e.value_codes is not None
        held = dataclasses.replace(view, keys=e.keys, values=e.values, positions=e.positions, received=e.received)
        tier = torch.maximum(e.tier, self.policy.tier(held))
        lower = tier > e.tier
        at = lower.any(0).any(0).nonzero()[:, 0]  # the slots where anything changes: one a token, in decoding
        if len(at):
            codes = self.coder.encode(
                self.index, e.keys[:, :, at], e.values[:, :, at], e.positions[:, :, at], tier[:, :, at]
            )
            lower = lower[:, :, at, None]
            e.key_codes[:, :, at] = torch.where(lower, codes[0], e.key_codes[:, :, at])
            e.value_codes[:, :, at] = torch.where(lower, codes[1], e.value_codes[:, :, at])
        e.tier = tier

    def _merge(self, view: CacheView, kept: Entries, index: Tensor, hidden: Tensor) -> None:
        """Let the policy change what is kept by what goes; not by what the layer's own window hides: nobody sees it."""
        stays = torch.zeros_like(view.positions, dtype=torch.bool)
        stays.scatter_(-1, index, kept.positions >= 0)
        gone = dataclasses.replace(view, positions=view.positions.masked_fill(stays | hidden, -1))
        held = dataclasses.replace(
            view, keys=kept.keys, values=kept.values, positions=kept.positions, received=kept.received
        )
        merged = self.policy.merge(held, gone)
        if merged is None:
            return
        changed = ((merged[0] != kept.keys) | (merged[1] != kept.values)).any(-1, keepdim=True)
        kept.keys, kept.values = merged
        if self.coder is not None and kept.key_codes is not None and kept.value_codes is not None:
            codes = self.coder.encode(self.index, *merged, kept.positions, kept.tier)
            kept.key_codes = torch.where(changed, codes[0], kept.key_codes)
            kept.value_codes = torch.where(changed, codes[1], kept.value_codes)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if isinstance(self.entries, Packed):
            return self.entries.slots + query_length, 0
        return (0 if self.entries is None else self.entries.positions.shape[-1]) + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.1x

    def change(self, made: Any) -> None:
        """Make a change to the entries in their padded form, and to the state by the same function."""
        packed, padded = isinstance(self.entries, Packed), self.padded
        if padded is not None:
            entries = made(padded)
            self.entries = Packed.of(entries, self.coder, self.index) if packed else entries

    def rows(self, pick: Any) -> None:
        """Replace every tensor by `pick` of it; batch comes first in all of them."""
        self.change(lambda entries: entries.each(pick))
        self.state = {name: pick(x) for name, x in self.state.items()}

    def forget_from(self, counts: Tensor) -> None:
        """Drop the entries at positions `counts`, int64 (batch,), and beyond."""

        def cut(entries: Entries) -> Entries:
            gone = entries.positions >= counts.view(-1, 1, 1).to(entries.positions.device)
            positions, order = entries.positions.masked_fill(gone, -1).sort(dim=-1, stable=True)
            first = order.shape[-1] - int((positions >= 0).sum(-1).max())
            return entries.take(order[..., first:], positions[..., first:])

        self.change(cut)
        self.dense = self.dense and not self.thinned

    def reset(self) -> None:
        self.entries = None
        self.state = {}
        self.is_initialized = False
        self.seen = 0
        self.dense, self.thinned = True, False
