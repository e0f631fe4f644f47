"""A policy in force on a model: how attention finds the cache, and the cache the policy.

The model's attention interface is pointed at `_attention`, and each attention module at its session. In each layer
transformers calls `PolicyCache.update` with the new keys and values, then `_attention`, which attends over what is held
and what is new, notes what each entry received where the policy wants to know, and lets the layer evict.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache

from foveate.cache.attend import attend, attend_and_receive, visible
from foveate.cache.entries import PolicyCache
from foveate.errors import FoveateError
from foveate.methods import Target
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.caches import replaced_cache

if TYPE_CHECKING:
    from foveate.cache.base import CachePolicy
    from foveate.cache.coders.base import Coder

_NAME = "foveate"


class Attending(Protocol):
    """What attends in the place of a model's attention: (batch, head, query, head_dim) in and out."""

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        sliding_window: int | None,
    ) -> Tensor: ...


_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Attending] = weakref.WeakKeyDictionary()
"""What is in force on an attention module: how the attention interface finds its way back."""


@contextmanager
def in_force(policy: CachePolicy, target: Target) -> Iterator[None]:
    """The policy, on the target's model, until the block ends."""
    parts = anatomy(target.model)
    check_free(policy.name, parts)
    session = Session(policy, parts, target)
    with (
        attending(parts, session),
        replaced_cache(target.model, session.new_cache, _replaceable, session.begin, session.end),
    ):
        yield


@contextmanager
def attending(parts: Anatomy, session: Attending) -> Iterator[None]:
    """The model's attention is the session's, until the block ends."""
    before = parts.model.config._attn_implementation
    for layer in parts.layers:
        _SESSIONS[layer.attention] = session
    parts.model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        parts.model.set_attn_implementation(before)
        for layer in parts.layers:
            _SESSIONS.pop(layer.attention, None)


def check_free(name: str, parts: Anatomy) -> None:
    """Raise FoveateError where a policy is in force on the model already; `name` is who asks."""
    if any(layer.attention in _SESSIONS for layer in parts.layers):
        raise FoveateError(f"{name}: another cache policy is in force on this model: leave its block first.")


def _replaceable(cache: Cache) -> bool:
    if isinstance(cache, PolicyCache):
        return False
    if isinstance(cache, DynamicCache):
        return True
    raise FoveateError(
        f"a {type(cache).__name__} was asked for, but a cache policy brings its own cache: leave out "
        "cache_implementation and past_key_values."
    )


class Session:
    """A policy in force on a model: it starts caches, and attends on the one that the present forward uses."""

    def __init__(self, policy: CachePolicy, parts: Anatomy, target: Target):
        self.policy, self.parts, self.context = policy, parts, target.context
        self.weights = None if policy.budget.measured else policy.budget.weights(target, policy.keep)
        self.coder: Coder | None = None
        self.watches = policy.watches() is not None
        self.index = {layer.attention: layer.index for layer in parts.layers}
        renumbers = policy.renumbers(parts)
        self.inv_freq = {layer.index: parts.inv_freq(layer.index) if renumbers else None for layer in parts.layers}
        self.cache: PolicyCache | None = None

    def new_cache(self) -> PolicyCache:
        return PolicyCache(self.policy, len(self.parts.layers), self.context, self.weights, self.coder)

    def begin(self, cache: Cache | None, inputs: dict[str, Any]) -> None:
        ids: Tensor = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        batch, new = ids.shape[:2]
        mask = inputs.get("attention_mask")
        valid: Tensor | None = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -new:].bool()
            valid = None if bool(real.all()) else real
        elif mask is not None:
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
        valid = None if step.valid is None else step.valid.to(query.device)
        index, new, slots = self.index[module], query.shape[2], key.shape[2]
        layer = None if self.cache is None else self.cache.layers[index]
        inv_freq = self.inv_freq[index]
        if layer is not None and layer.thinned and inv_freq is not None:
            key = layer.moved_keys(step, inv_freq)
        # What is received decides nothing as long as nothing may ever be evicted.
        wanted = layer is not None and self.watches and (step.limits is None or step.limits.any)

        if layer is not None and not self.policy.evicts:
            read = layer.reads(step, query)
            if read is not None:
                positions = layer.working.positions.gather(-1, read.clamp(min=0)).masked_fill(read < 0, -1)
                who = visible(step.positions.to(query.device), positions, valid, sliding_window)
                at = read.clamp(min=0)[..., None].expand(-1, -1, -1, key.shape[-1])
                part = (query, key.gather(2, at), value.gather(2, at), who)
                if wanted:
                    out, received = attend_and_receive(*part, step.gain, scaling=scaling, softcap=softcap)
                    layer.receive_part(received, read, step)
                else:
                    out = attend(*part, causal=False, scaling=scaling, softcap=softcap)
                layer.finish(step, query, sliding_window)
                return out

        dense = valid is None if layer is None else layer.dense
        beyond = sliding_window is not None and self.book.seen + new > sliding_window
        causal, mask = False, None
        if not dense or beyond:
            at = step.positions.to(query.device)
            if layer is None:
                positions = (at if valid is None else at.masked_fill(~valid, -1))[:, None]
            else:
                positions = layer.working.positions
            mask = visible(at, positions, valid, sliding_window if beyond else None)
        elif new == slots and not wanted:
            causal = True
        elif new > 1:
            mask = torch.ones(1, 1, new, slots, dtype=torch.bool, device=query.device).tril(slots - new)

        if layer is not None and wanted:
            out, received = attend_and_receive(query, key, value, mask, step.gain, scaling=scaling, softcap=softcap)
            layer.receive(received, step)
        else:
            out = attend(query, key, value, mask, causal=causal, scaling=scaling, softcap=softcap)
        if layer is not None:
            layer.finish(step, query, sliding_window)
        return out


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
