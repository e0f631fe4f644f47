"""The cache role: which key-value entries stay. A technique scores entries; everything else is here.

How it works. `applied` hooks the decoder, so that a forward runs on a `PolicyCache` in place of the model's own cache,
and points the model's attention interface at `_attention`. In each layer, transformers calls `PolicyLayer.update` with
the new keys and values, then `_attention`, which attends over what is held plus what is new, notes what each entry
received where the policy wants to know, and lets the layer evict down to its budget.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from foveate.cache.attend import attend, attend_and_receive, rotate, visible
from foveate.errors import FoveateError
from foveate.methods import Method, Target, check_fraction
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.caches import replaced_cache


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


@dataclass(frozen=True, kw_only=True)
class CachePolicy(Method):
    """Base of all cache policies. A technique overrides `score`; eviction, budgets, sinks and positions are here.

    Fields:
        keep: budget, the fraction of the prompt's tokens that each KV head holds; of `context` where the caller of
            `apply` states one. The prompt is what came in forwards of more than one token; it is rounded down, but
            never below `sinks` + 1. Generated tokens don't raise it. `keep=1` without a stated context keeps
            everything, generated tokens too.
        entries: budget, the number of entries that each KV head holds. Exactly one of `keep` and `entries` is given.
        sinks: this many first tokens of the text are never evicted.
        recent: this fraction of the budget is reserved for the most recent tokens (never less than the last one).
        positions: "text": entries keep their positions in the text. "cache": entries are renumbered by their place
            in the cache whenever they are attended to, so that distances never exceed the budget; needs rotary
            positions.
    """

    role: ClassVar[str] = "cache"
    needs_received: ClassVar[bool] = False
    """Whether `score` reads `view.received`; attention is slower where it is wanted."""

    keep: float | None = None
    entries: int | None = None
    sinks: int = 0
    recent: float = 0.0
    positions: str = "text"

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.entries is None):
            raise FoveateError(
                f"{self.name}: give the budget as keep=f (a fraction of the prompt) or as entries=N (per KV head), "
                f"{'one of them' if self.keep is None else 'not both'}."
            )
        if self.keep is not None:
            check_fraction(self.name, self.keep)
        if self.sinks < 0:
            raise FoveateError(f"{self.name}: sinks={self.sinks} is negative: give 0 or more.")
        if self.entries is not None and self.entries <= self.sinks:
            raise FoveateError(
                f"{self.name}: entries={self.entries} leaves no room beside {self.sinks} sinks: give at least "
                f"{self.sinks + 1}."
            )
        if not 0 <= self.recent <= 1:
            raise FoveateError(f"{self.name}: recent={self.recent} is outside [0, 1]: it is a fraction of the budget.")
        if self.positions not in ("text", "cache", "auto"):
            raise FoveateError(f"{self.name}: positions={self.positions} is not one of text, cache, auto.")

    @abstractmethod
    def score(self, view: CacheView) -> Tensor:
        """How much each entry matters, float (batch, kv_head, entry): the lowest are evicted first.

        Sinks, the recent window and empty slots are the base's: their scores are overruled.
        """

    def capacity(self, prompt: int, context: int | None) -> int | None:
        """Entries that a KV head of a sequence may hold; None = without limit."""
        if self.entries is not None:
            return self.entries
        if self.keep == 1 and context is None:
            return None
        assert self.keep is not None  # by __post_init__
        return max(math.floor(self.keep * (context or prompt) + 1e-9), self.sinks + 1)

    def renumbers(self, parts: Anatomy) -> bool:
        """Whether entries are attended to at their places in the cache on this model."""
        able = parts.positions == "rotary" and parts.rotary_is_static
        if self.positions == "cache" and not able:
            raise FoveateError(
                f"{self.name}: positions=cache moves keys by rotating them, which needs rotary positions of fixed "
                f"frequencies; this {parts.family} model has none: use positions=text."
            )
        return self.positions == "cache" or (self.positions == "auto" and able)

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        model, parts = target.model, anatomy(target.model)
        if any(layer.attention in _SESSIONS for layer in parts.layers):
            raise FoveateError(f"{self.name}: another cache policy is in force on this model: leave its block first.")
        session = _Session(self, parts, target.context)
        before = model.config._attn_implementation
        for layer in parts.layers:
            _SESSIONS[layer.attention] = session
        model.set_attn_implementation(_NAME)
        try:
            with replaced_cache(model, session.new_cache, _replaceable, session.begin, session.end):
                yield
        finally:
            model.set_attn_implementation(before)
            for layer in parts.layers:
                _SESSIONS.pop(layer.attention, None)


def _replaceable(cache: Cache) -> bool:
    if isinstance(cache, PolicyCache):
        return False
    if isinstance(cache, DynamicCache):
        return True
    raise FoveateError(
        f"a {type(cache).__name__} was asked for, but a cache policy brings its own cache: leave out "
        "cache_implementation and past_key_values."
    )


@dataclass
class _Step:
    """One forward.

    Attributes:
        new: tokens a sequence, padding included.
        start, end: (batch,), int64: real tokens of each sequence before and after.
        positions: (batch, new), int64: the tokens' positions in the text.
        valid: (batch, new), bool: False for padding; None = no padding.
        capacity: entries that a KV head of each sequence may hold after; None = without limit.
    """

    new: int
    start: Tensor
    end: Tensor
    positions: Tensor
    valid: Tensor | None
    capacity: list[int | None]


class PolicyLayer(CacheLayerMixin):
    """The entries of one layer: keys and values (batch, kv_head, entry, head_dim), positions, attention received."""

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

    def update(self, key_states: Tensor, value_states: Tensor, step: _Step) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Append; eviction follows the attention."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        self.dense = self.dense and step.valid is None
        new = step.positions if step.valid is None else step.positions.masked_fill(~step.valid, -1)
        new = new[:, None].expand(*key_states.shape[:3]).int()
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.positions = torch.cat([self.positions, new], dim=2)
        if self.received is not None:
            self.received = torch.cat([self.received, torch.zeros_like(new, dtype=torch.float32)], dim=2)
        return self.keys, self.values

    def moved_keys(self, step: _Step, inv_freq: Tensor) -> Tensor:
        """The keys, renumbered by their place in the cache as seen from the tokens just appended.

        Distances are all that rotary attention sees: the new tokens stay where they are, the others move up to them.
        """
        live = self.positions >= 0
        rank = live.cumsum(-1) - 1
        before = live[..., : -step.new].sum(-1, keepdim=True)
        shift = step.start.view(-1, 1, 1) - before + rank - self.positions
        return rotate(self.keys, shift.masked_fill(~live, 0), inv_freq)

    def evict(self, step: _Step, sliding_window: int | None) -> None:
        """Keep as many entries as the step allows, and none that the layer's own window hides from the next token."""
        slots, capacity = self.positions.shape[-1], step.capacity
        most = max(slots if limit is None else min(limit, slots) for limit in capacity)
        if sliding_window is not None:
            most = min(most, sliding_window)
        least = min(slots if limit is None else limit for limit in capacity)
        if slots <= min(least, most):
            return
        seen, policy = step.end.view(-1, 1, 1), self.policy
        limits = torch.tensor([slots if c is None else c for c in capacity], device=seen.device).view(-1, 1, 1)
        score = policy.score(
            CacheView(self.index, self.keys, self.values, self.positions, self.received, seen)
        ).float()
        recent = torch.minimum((limits * policy.recent).long(), limits - policy.sinks).clamp(min=1)
        score = score.masked_fill(self.positions >= seen - recent, torch.finfo(torch.float32).max)
        score = score.masked_fill(self.positions < policy.sinks, torch.inf)
        hidden = self.positions < 0
        if sliding_window is not None:
            hidden = hidden | (self.positions <= seen - sliding_window)
        score = score.masked_fill(hidden, -torch.inf)
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

    def __init__(self, policy: CachePolicy, layers: int, context: int | None):
        self.policy, self.context = policy, context
        self.step: _Step | None = None
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
        positions = start.to(device)[:, None] + order
        self.step = _Step(new, start.to(device), end.to(device), positions, valid, capacity)

    def finish(self) -> None:
        """The forward is through."""
        if self.step is not None:
            self.counts, self.seen, self.step = self.step.end.cpu(), self.seen + self.step.new, None

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


class _Session:
    """A policy in force on a model: it starts caches, and attends on the one that the present forward uses."""

    def __init__(self, policy: CachePolicy, parts: Anatomy, context: int | None):
        self.policy, self.parts, self.context = policy, parts, context
        self.index = {layer.attention: layer.index for layer in parts.layers}
        renumbers = policy.renumbers(parts)
        self.inv_freq = {layer.index: parts.inv_freq(layer.index) if renumbers else None for layer in parts.layers}
        self.cache: PolicyCache | None = None

    def new_cache(self) -> PolicyCache:
        return PolicyCache(self.policy, len(self.parts.layers), self.context)

    def begin(self, cache: Cache | None, inputs: dict[str, Any]) -> None:
        ids = inputs.get("input_ids")
        ids = inputs["inputs_embeds"] if ids is None else ids
        batch, new = ids.shape[:2]
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            valid = mask[:, -new:].bool()
            valid = None if bool(valid.all()) else valid
        elif mask is None:
            valid = None
        else:
            raise FoveateError(
                "an attention mask of more than (batch, tokens) was passed, but a cache policy makes its own masks: "
                "pass which tokens are real, as (batch, tokens), or no mask."
            )
        self.cache = cache if isinstance(cache, PolicyCache) else None
        # Without a cache (use_cache=False) nothing is evicted: a cache for this one forward says who sees whom.
        self.book = self.cache or self.new_cache()
        self.book.begin(batch, new, valid, ids.device)

    def end(self) -> None:
        self.book.finish()

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        step = self.book.step
        assert step is not None  # begin ran
        index, new, slots = self.index[module], query.shape[2], key.shape[2]
        layer = None if self.cache is None else self.cache.layers[index]
        inv_freq = self.inv_freq[index]
        if layer is not None and layer.thinned and inv_freq is not None:
            key = layer.moved_keys(step, inv_freq)
        wanted = layer is not None and layer.received is not None and any(c is not None for c in step.capacity)

        dense = step.valid is None if layer is None else layer.dense
        beyond = sliding_window is not None and self.book.seen + new > sliding_window
        causal, mask = False, None
        if not dense or beyond:
            if layer is None:
                real = step.positions if step.valid is None else step.positions.masked_fill(~step.valid, -1)
                positions = real[:, None]
            else:
                positions = layer.positions
            mask = visible(step.positions, positions, step.valid, sliding_window if beyond else None)
        elif new == slots and not wanted:
            causal = True
        elif new > 1:
            mask = torch.ones(1, 1, new, slots, dtype=torch.bool, device=query.device).tril(slots - new)

        if wanted:
            out, received = attend_and_receive(query, key, value, mask, step.valid, scaling=scaling, softcap=softcap)
            layer.received += received
        else:
            out = attend(query, key, value, mask, causal=causal, scaling=scaling, softcap=softcap)
        if layer is not None:
            layer.evict(step, sliding_window)
        return out


_NAME = "foveate"
_SESSIONS: weakref.WeakKeyDictionary[nn.Module, _Session] = weakref.WeakKeyDictionary()
"""Which policy is in force on an attention module: how the attention interface finds its way back."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: (batch, head, query, head_dim) in, (batch, query, head, head_dim) out."""
    out = _SESSIONS[module].attention(
        module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
