"""The entries that a policy holds: a layer's keys, values and positions, and the cache of all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from foveate.cache.attend import rotate
from foveate.errors import FoveateError

if TYPE_CHECKING:
    from foveate.cache.base import CachePolicy


@dataclass
class CacheView:
    """What a policy sees of one layer when it scores.

    Attributes:
        layer: index of the layer.
        keys, values: (batch, kv_head, entry, head_dim), in the model's dtype.
        positions: (batch, kv_head, entry), int32: positions in the text, ascending; -1 = an empty slot.
        received: (batch, kv_head, entry), float32: attention each entry received so far, summed over queries and over
            the query heads of its group; None unless the policy sets `needs_received`.
        seen: (batch, 1, 1), int: tokens of each sequence so far, padding not counted.
    """

    layer: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    received: Tensor | None
    seen: Tensor


_BEYOND = 1 << 40


@dataclass
class Step:
    """One forward.

    Attributes:
        new: tokens a sequence, padding included.
        start, end: (batch, 1, 1), int64: real tokens of each sequence before and after.
        positions: (batch, new), int64: the tokens' positions in the text.
        valid: (batch, new), bool: False for padding; None = no padding.
        capacity: entries that a KV head of each sequence may hold after; None = without limit.
        limits: the same, (batch, 1, 1), int64, on the device; without limit = a number beyond any length.
    """

    new: int
    start: Tensor
    end: Tensor
    positions: Tensor
    valid: Tensor | None
    capacity: list[int | None]
    limits: Tensor


class PolicyLayer(CacheLayerMixin):
    """The entries of one layer: keys and values (batch, kv_head, entry, head_dim), positions, attention received."""

    keys: Any  # Tensor, or None before the first update; so are the next three
    values: Any
    positions: Any
    received: Any
    dense: bool
    thinned: bool

    def __init__(self, index: int, policy: CachePolicy):
        super().__init__()
        self.index, self.policy = index, policy
        self.reset()

    def held(self) -> Tensor:
        """Entries that each KV head holds: int (batch, kv_head)."""
        return (self.positions >= 0).sum(-1) if self.positions is not None else torch.zeros(1, 1, dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, kv_heads = key_states.shape[:2]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.positions = torch.empty(batch, kv_heads, 0, dtype=torch.int32, device=key_states.device)
        if self.policy.needs_received:
            self.received = torch.empty(batch, kv_heads, 0, dtype=torch.float32, device=key_states.device)
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
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.positions = torch.cat([self.positions, new], dim=2)
        if self.received is not None:
            self.received = torch.cat([self.received, torch.zeros_like(new, dtype=torch.float32)], dim=2)
        return self.keys, self.values

    def moved_keys(self, step: Step, inv_freq: Tensor) -> Tensor:
        """The keys, renumbered by their place in the cache as seen from the tokens just appended.

        Distances are all that rotary attention sees: the new tokens stay where they are, the others move up to them.
        """
        live = self.positions >= 0
        rank = live.cumsum(-1) - 1
        before = live[..., : -step.new].sum(-1, keepdim=True)
        shift = step.start.to(live.device) - before + rank - self.positions
        return rotate(self.keys, shift.masked_fill(~live, 0), inv_freq)

    def evict(self, step: Step, sliding_window: int | None) -> None:
        """Keep as many entries as the step allows, and none that the layer's own window hides from the next token."""
        slots, capacity = self.positions.shape[-1], step.capacity
        most = max(slots if limit is None else min(limit, slots) for limit in capacity)
        if sliding_window is not None:
            most = min(most, sliding_window)
        least = min(slots if limit is None else limit for limit in capacity)
        if slots <= min(least, most):
            return
        policy = self.policy
        seen, limits = step.end.to(self.positions.device), step.limits.to(self.positions.device)
        score = policy.score(CacheView(self.index, self.keys, self.values, self.positions, self.received, seen)).float()
        recent = torch.minimum((limits * policy.recent).long(), limits - policy.sinks).clamp(min=1)
        score = score.masked_fill(self.positions >= seen - recent, torch.finfo(torch.float32).max)
        score = score.masked_fill(self.positions < policy.sinks, torch.inf)
        hidden = self.positions < 0
        if sliding_window is not None:
            hidden = hidden | (self.positions <= seen - sliding_window)
        score = score.masked_fill(hidden, -torch.inf)
        if self.dense and sliding_window is None and slots == most + 1:  # in decoding: one goes, the rest close up
            index = torch.arange(most, device=seen.device)
            index = index + (index >= score.argmin(dim=-1, keepdim=True))
            self._take(index, self.positions.gather(-1, index))
        else:
            kept = score.topk(most, dim=-1)
            empty = (torch.arange(most, device=seen.device) >= limits) | (kept.values == -torch.inf)
            positions = self.positions.gather(-1, kept.indices).masked_fill(empty, -1)
            positions, order = positions.sort(dim=-1)  # empty slots first, then in the text's order
            self._take(kept.indices.gather(-1, order), positions)
        self.thinned = True
        self.dense = self.dense and sliding_window is None

    def _take(self, index: Tensor, positions: Tensor) -> None:
        wide = index[..., None]
        self.keys = self.keys.gather(2, wide.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, wide.expand(-1, -1, -1, self.values.shape[-1]))
        if self.received is not None:
            self.received = self.received.gather(2, index)
        self.positions = positions

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.positions.shape[-1] if self.positions is not None else 0) + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.1x

    def rows(self, pick: Any) -> None:
        """Replace every tensor by `pick` of it; batch comes first in all of them."""
        for name in ("keys", "values", "positions", "received"):
            if isinstance(tensor := getattr(self, name), Tensor):
                setattr(self, name, pick(tensor))

    def reset(self) -> None:
        self.keys = self.values = self.positions = self.received = None
        self.is_initialized = False
        self.seen = 0
        self.dense = True  # there are no empty slots
        self.thinned = False  # something has been evicted


class PolicyCache(Cache):
    """The cache of a policy: a `PolicyLayer` for each layer, and how many tokens each sequence has seen.

    `get_seq_length` is the number of tokens that went through, not of entries held, so that positions go on as in the
    text.
    """

    layers: list[PolicyLayer]  # type: ignore[assignment]

    def __init__(self, policy: CachePolicy, layers: int, context: int | None):
        self.policy, self.context = policy, context
        self.step: Step | None = None
        self.reset()
        super().__init__(layers=[PolicyLayer(i, policy) for i in range(layers)])

    def reset(self) -> None:
        self.seen = 0  # columns, padding included: what transformers counts
        self.counts: Tensor | None = None  # (batch,) int64, on the CPU: real tokens of each sequence
        self.prompt: Tensor | None = None  # (batch,) of these, tokens that came in forwards of more than one
        for layer in getattr(self, "layers", ()):
            layer.reset()

    def begin(self, batch: int, new: int, valid: Tensor | None, device: torch.device) -> None:
        """Note the tokens of the forward that starts."""
        start = torch.zeros(batch, dtype=torch.int64) if self.counts is None else self.counts
        end = start + (new if valid is None else valid.sum(-1).cpu())
        order = torch.arange(new, device=device) if valid is None else valid.long().cumsum(-1) - 1
        if new > 1 or self.prompt is None:
            self.prompt = end
        capacity = [self.policy.capacity(int(n), self.context) for n in self.prompt]
        limits = torch.tensor([_BEYOND if c is None else c for c in capacity]).view(-1, 1, 1).to(device)
        before, after = start.view(-1, 1, 1).to(device), end.view(-1, 1, 1).to(device)
        self.after = end
        self.step = Step(new, before, after, before[:, 0] + order, valid, capacity, limits)

    def finish(self) -> None:
        """The forward is through."""
        if self.step is not None:
            self.counts, self.seen, self.step = self.after, self.seen + self.step.new, None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.step is None:
            raise FoveateError("a policy's cache works only inside the `with` block of the recipe it came from.")
        return self.layers[layer_idx].update(key_states, value_states, self.step)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def _rows(self, pick: Any) -> None:
        for layer in self.layers:
            layer.rows(pick)
        if self.counts is not None and self.prompt is not None:
            self.counts, self.prompt = pick(self.counts), pick(self.prompt)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (a positive number is a length to keep); what was evicted to
        make room for them does not come back."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else self.seen - tokens_to_remove
        if remove <= 0 or self.counts is None or self.prompt is None:
            return
        self.seen -= remove
        self.counts = (self.counts - remove).clamp(min=0)
        self.prompt = torch.minimum(self.prompt, self.counts)
        for layer in self.layers:
            if layer.positions is not None:
                gone = layer.positions >= self.counts.view(-1, 1, 1).to(layer.positions.device)
                positions, order = layer.positions.masked_fill(gone, -1).sort(dim=-1, stable=True)
                most = int((positions >= 0).sum(-1).max())
                layer._take(order[..., order.shape[-1] - most :], positions[..., order.shape[-1] - most :])
                layer.seen -= remove
                layer.dense = layer.dense and not layer.thinned
