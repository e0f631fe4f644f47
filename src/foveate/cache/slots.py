"""Entries in slots: a cache whose tensors never change their shape or place, for decoding token by token.

Each KV head of each sequence owns a region of slots, one for each entry that it may hold and one for the token at work.
A new token's entry goes to the region's free slot; once the region is full, the entry that the policy would evict is
the next to be overwritten. So a step is the same operations on the same memory every time, and nothing in it asks the
device for a number: it can be captured in a CUDA graph (`loop.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from foveate.cache.attend import rotate
from foveate.cache.entries import NO_LIMIT, CacheView
from foveate.cache.packed import Entries
from foveate.cache.policy_cache import PolicyCache
from foveate.errors import FoveateError

if TYPE_CHECKING:
    from foveate.cache.base import CachePolicy


class SlotView(CacheView):
    """What a policy sees of a `SlotLayer`: as `CacheView`, but the entries stand in no order.

    Where KV heads differ in their number of slots, the padded form of a tensor is made when it is asked for.
    """

    def __init__(self, of: SlotLayer, query: Tensor, now: Tensor):
        self.of, self.layer, self.query = of, of.index, query
        self.query_positions, self.seen, self.valid, self.state = now, now[..., None] + 1, None, {}
        self.inv_freq = of.frequencies
        self.positions = of.padded(of.positions) if of.gather is None else of.padded(of.positions, -1)

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self.of.padded(self.of.keys)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.of.padded(self.of.values)

    @property
    def received(self) -> Tensor | None:  # type: ignore[override]
        return None if self.of.received is None else self.of.padded(self.of.received)


class SlotLayer(CacheLayerMixin):
    """One layer's entries in slots. A region is those of one KV head of one sequence, in the order (batch, kv_head).

    Attributes:
        keys, values: (slots of all regions, head_dim).
        positions: (slots of all regions,), int32: positions in the text, in no order; -1 = a slot not used so far.
        received: (slots of all regions,), float32; None where the policy doesn't watch, or nothing will be evicted.
        offsets: (regions + 1,), int64: region r owns the slots from offsets[r] up to offsets[r + 1].
        lengths: (regions,), int32: slots in use, the first of each region; before an attention, all hold live entries.
        limit: (batch, kv_head, 1), int64: entries that may be held after a step.
        slot: (regions,), int64: where the next entry goes: a free slot, or that of the entry that was evicted.
        rank: (slots of all regions,), int32: how many entries of the region come before, in the text; None where
            entries keep their positions, or only sinks move.
        sinks: (regions * sinks,), int64: the slots of the sinks, and `whole`, (regions * sinks, head_dim): their keys
            as they came; None unless entries are renumbered and only sinks move.
        gather: (batch, kv_head, slot), int64: the padded form of the regions; None where all have as many slots.
    """

    keys: Tensor
    values: Tensor
    is_compileable = False  # not by transformers: the loop captures its own steps
    is_sliding = False

    def __init__(
        self,
        index: int,
        policy: CachePolicy | None,
        entries: Entries,
        limit: Tensor,
        room: int | None,
        inv_freq: Tensor | None,
        renumbers: bool,
        latest: bool,
    ):
        live = entries.positions >= 0
        count = live.sum(-1).flatten()
        self.index, self.policy, self.limit = index, policy, limit
        size = torch.minimum(limit.flatten() + 1, count + (NO_LIMIT if room is None else room))
        if int(size.max()) >= NO_LIMIT:
            raise FoveateError(
                "nothing bounds how many entries this cache will hold, but its memory is taken beforehand: say how "
                "many tokens will follow, as room=N."
            )
        self.bounded = bool((size > limit.flatten()).any())
        self.offsets = torch.nn.functional.pad(size.cumsum(0), (1, 0))
        self.start = self.offsets[:-1].clone()
        self.batch, self.kv_heads, _, dim = entries.keys.shape
        most, total = int(size.max()), int(self.offsets[-1])
        self.slots, uniform = most, total == most * len(size)

        rank = live.cumsum(-1) - 1
        at = (self.start.view(self.batch, self.kv_heads, 1) + rank)[live]

        def flat(padded: Tensor) -> Tensor:
            slots = padded.new_zeros(total, *padded.shape[3:])
            slots[at] = padded[live]
            return slots

        self.keys, self.values = flat(entries.keys), flat(entries.values)
        self.positions = flat(entries.positions + 1) - 1
        self.received = None if entries.received is None or not self.bounded else flat(entries.received)
        self.lengths = count.int()
        self.slot = self.start + count
        recent, sinks = (0.0, 0) if policy is None else (policy.recent, policy.sinks)
        self.frequencies, self.inv_freq = inv_freq, inv_freq if renumbers else None
        self.rank, self.sinks = None, None
        if self.inv_freq is not None:
            from_end = live.sum(-1, keepdim=True) - rank
            in_window = entries.positions == entries.positions.amax(-1, keepdim=True) + 1 - from_end
            if latest and int(count.min()) >= sinks and bool((in_window | (rank < sinks))[live].all()):
                # Sinks and an unbroken window: only sinks move, all as far, and they stay in their slots.
                self.sinks = (self.start[:, None] + torch.arange(sinks, device=limit.device)).flatten()
                self.whole = self.keys[self.sinks]
            else:
                self.rank = flat(rank.int())
                self.region = torch.arange(len(size), device=limit.device).repeat_interleave(size)
        self.recent = torch.minimum((limit * recent).long(), limit - sinks).clamp(min=1)
        self.gather: Tensor | None = None
        if not uniform:
            order = torch.arange(most, device=limit.device)
            last = (size - 1).view(self.batch, self.kv_heads, 1)
            self.beyond = order > last
            self.gather = self.start.view_as(last) + torch.minimum(order, last)
            self.flatten = (~self.beyond).flatten().nonzero()[:, 0]  # from the padded form back
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def padded(self, flat: Tensor, filler: int | None = None) -> Tensor:
        """(slots of all regions, ...) as (batch, kv_head, slot, ...): a view where all regions have as many slots."""
        if self.gather is None:
            return flat.view(self.batch, self.kv_heads, self.slots, *flat.shape[1:])
        return flat[self.gather] if filler is None else flat[self.gather].masked_fill(self.beyond, filler)

    def held(self) -> Tensor:
        """Entries that each KV head holds between two steps: int64 (batch, kv_head)."""
        return torch.minimum(self.lengths.view(self.batch, self.kv_heads), self.limit[..., 0])

    def held_positions(self) -> list[list[list[int]]]:
        """The positions in the text of the entries held between two steps, ascending, by sequence and KV head."""
        positions = self.positions.clone()
        positions[self.slot[self.slot < self.offsets[1:]]] = -1
        rows = self.padded(positions, -1).tolist()
        return [[sorted(p for p in head if p >= 0) for head in row] for row in rows]

    def append(self, key: Tensor, value: Tensor, now: Tensor) -> None:
        """Put the entries of one token, (batch, kv_head, 1, head_dim), into the regions' next slots."""
        self.lengths.add_(self.slot - self.start == self.lengths)
        self.keys.index_copy_(0, self.slot, key.reshape(-1, key.shape[-1]))
        self.values.index_copy_(0, self.slot, value.reshape(-1, value.shape[-1]))
        self.positions.index_copy_(0, self.slot, now.expand(-1, self.kv_heads).reshape(-1).int())
        if self.received is not None:
            self.received.index_copy_(0, self.slot, torch.zeros_like(self.slot, dtype=torch.float32))
        if self.rank is not None:
            self.rank.index_copy_(0, self.slot, self.lengths - 1)

    def moved_keys(self, now: Tensor) -> Tensor:
        """The keys, renumbered by their place in the cache as seen from the newest, as `PolicyLayer.moved_keys`."""
        if self.inv_freq is None:
            return self.keys
        first = now.expand(-1, self.kv_heads).reshape(-1) - self.lengths + 1
        if self.sinks is not None:
            shift = first[:, None].expand(-1, len(self.whole) // len(first)).reshape(-1)
            self.keys.index_copy_(0, self.sinks, rotate(self.whole, shift, self.inv_freq))
            return self.keys
        assert self.rank is not None  # or sinks would be there
        return rotate(self.keys, first[self.region] + self.rank - self.positions, self.inv_freq)

    def evict(self, query: Tensor, now: Tensor) -> None:
        """Choose the slots of the next token: as `PolicyLayer.evict`, the lowest score goes once a region is full."""
        if self.policy is None or not self.bounded:
            self.slot.add_(1)
            return
        view = SlotView(self, query, now)
        score = self.policy.score(view).float()
        score = score.masked_fill(view.positions >= view.seen - self.recent, torch.finfo(torch.float32).max)
        score = score.masked_fill(view.positions < self.policy.sinks, torch.inf)  # unused slots, at -1, too
        full = self.lengths > self.limit.flatten()
        lowest = self.start + score.argmin(-1).flatten()
        if self.rank is not None:  # those behind what goes move up
            gone = torch.where(full, self.positions[lowest], torch.iinfo(torch.int32).max)
            self.rank.sub_((self.positions > gone[self.region]).int())
        self.slot.copy_(torch.where(full, lowest, self.start + self.lengths))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.append(key_states, value_states, *args, **kwargs)
        return key_states, value_states  # the loop's attention looks into the slots itself

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("slots are filled from a cache")

    def get_seq_length(self) -> int:
        return 0  # nobody asks: positions are passed in, and masks are the loop's

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class SlotCache(Cache):
    """The cache of a decode loop, made of another one, whose entries move here and leave it empty.

    Args:
        cache: a policy's cache, or the model's own (`DynamicCache`), after the prompt has been read.
        room: tokens that will follow at most; None = any number, where every KV head has a budget.
        valid: (batch, tokens), bool: False for padding in the model's own cache; a policy's cache knows it.
        inv_freq: the rotary frequencies of each layer, by its index; None where positions are not rotary.
        renumbers: whether entries are renumbered by their place in the cache, or keep their positions in the text.
        latest: whether the policy keeps the most recent entries beside its sinks.
    """

    layers: list[Any]

    bears_gaps = True  # see NoAttention

    def __init__(
        self,
        cache: Cache,
        *,
        room: int | None = None,
        valid: Tensor | None = None,
        inv_freq: Callable[[int], Tensor | None] = lambda index: None,
        renumbers: bool = False,
        latest: bool = False,
    ):
        sources: list[Any] = list(cache.layers)
        filled = [layer for layer in sources if layer.is_initialized]
        if not filled:
            raise FoveateError("the cache is empty: read the prompt first, then make the loop of its past_key_values.")
        self.device = filled[0].device
        if any(layer.device != self.device for layer in filled):
            raise FoveateError("the cache's layers lie on several devices: a decode loop needs a model on one.")
        self.policy: CachePolicy | None = None
        self.forget = 1.0
        if isinstance(cache, PolicyCache):
            self.policy, counts = cache.policy, cache.counts
            assert counts is not None  # something was read
            limits = cache.limits or cache._limits(self.device)
            watches = self.policy.watches()
            if watches is not None:  # of one token, as `Received.weights` has it
                self.forget = watches.forget if watches.last is None else max(0.0, 1 - 1 / watches.last)
        elif isinstance(cache, DynamicCache):
            batch, _, seen = filled[0].keys.shape[:3]
            valid = torch.ones(batch, seen, dtype=torch.bool) if valid is None else valid.bool()
            if valid.shape != (batch, seen):
                raise FoveateError(
                    f"the mask is {tuple(valid.shape)}, but {batch} sequences of {seen} tokens, padding included, were "
                    "read: pass the mask that the prompt was read with."
                )
            counts, limits = valid.sum(-1).cpu(), None
            at = (valid.cumsum(-1) - 1).masked_fill(~valid, -1).to(self.device, torch.int32)[:, None]
        else:
            raise FoveateError(
                f"a decode loop can't be made of a {type(cache).__name__}: read the prompt with a policy in force, or "
                "onto the model's own DynamicCache."
            )
        self.room, self.taken, self.prompt = room, 0, int(counts.max())
        self.next = counts.view(-1, 1).to(self.device)  # (batch, 1), int64: the position of the token at work
        layers: list[Any] = []
        for index, layer in enumerate(sources):
            if not layer.is_initialized:  # it is skipped
                layers.append(layer)
                continue
            if limits is None:
                entries = Entries(layer.keys, layer.values, at.expand(-1, layer.keys.shape[1], -1))
                limit = torch.full((*layer.keys.shape[:2], 1), NO_LIMIT, device=self.device)
            else:
                entries, limit = layer.padded, limits.of[index]
            layers.append(SlotLayer(index, self.policy, entries, limit, room, inv_freq(index), renumbers, latest))
            del entries
            if limits is None:  # at once, so that no more than one layer is held twice
                layer.keys = layer.values = None
                layer.is_initialized = False
            else:
                layer.reset()
        if isinstance(cache, PolicyCache):
            cache.reset()
        super().__init__(layers=layers)

    @property
    def filled(self) -> list[SlotLayer]:
        """The layers that hold entries: all but those that are skipped."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    def take(self, tokens: int) -> None:
        """So many tokens are about to come in."""
        if self.room is not None and self.taken + tokens > self.room:
            raise FoveateError(
                f"{self.taken} tokens came in and {tokens} more were asked for, but there is room for {self.room}: "
                "make the loop with a larger room."
            )
        self.taken += tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].update(key_states, value_states, self.next)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prompt + self.taken
