"""A policy in force on a model: how attention finds the cache, and the cache the policy.

In each layer transformers calls `PolicyCache.update` with the new keys and values, then `Session.attention`, which
attends over what is held and what is new, notes what each entry received where the policy wants to know, and lets the
layer evict.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from foveate.cache.attend import attend, attend_and_receive, visible
from foveate.cache.policy_cache import PolicyCache
from foveate.cache.slots import SlotCache
from foveate.errors import FoveateError
from foveate.kernels import received as kernel
from foveate.methods import Target
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.attention import Call, replaced_attention
from foveate.models.caches import replaced_cache

if TYPE_CHECKING:
    from foveate.cache.base import CachePolicy

FAR = 64
"""Whether tokens look back beyond the model's positions is checked every so many tokens."""


@contextmanager
def in_force(policy: CachePolicy, target: Target) -> Iterator[None]:
    """The policy, on the target's model, until the block ends."""
    model = target.model
    session = Session(policy, anatomy(model), target)
    with (
        replaced_attention(model, session.attention, policy.name),
        replaced_cache(model, session.new_cache, _replaceable, session.begin, session.end),
    ):
        yield


def _replaceable(cache: Cache) -> bool:
    if isinstance(cache, (PolicyCache, SlotCache)):
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
        self.weights, self.coder = policy.weights(target), policy.coder(target)
        self.watches = policy.watches()
        self.renumbers = policy.renumbers(parts)
        self.inv_freq = {layer.index: parts.inv_freq(layer.index) for layer in parts.layers}
        self.cache: PolicyCache | None = None
        self.warned, self.checked = False, parts.max_positions // FAR

    def new_cache(self) -> PolicyCache:
        return PolicyCache(self.policy, len(self.parts.layers), self.context, self.weights, self.coder, self.renumbers)

    def begin(self, cache: Cache | None, inputs: dict[str, Any]) -> None:
        self.book: PolicyCache | None = None
        if isinstance(cache, SlotCache):
            return  # its loop does all of it
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
        longest = int(self.book.after.max())
        if longest > self.parts.max_positions and self.parts.positions == "learned":
            raise FoveateError(
                f"this model has a table of {self.parts.max_positions} learned positions, and token {longest} was to "
                "be read: no cache policy can help that; read less, or take a model with rotary positions."
            )

    def end(self) -> None:
        if self.book is None:
            return
        self.book.finish()
        if not self.warned and self.cache is not None and self.cache.seen // FAR > self.checked:
            self.checked = self.cache.seen // FAR
            if (distance := self.cache.reach()) > self.parts.max_positions:
                self.warned = True
                warnings.warn(
                    f"{self.policy.name}: tokens look back {distance} positions, and this model was made for "
                    f"{self.parts.max_positions}: expect nonsense from here on. Hold fewer entries, or take a policy "
                    "that renumbers what it holds: streaming, or any with positions=cache.",
                    stacklevel=2,
                )

    def attention(self, call: Call) -> Tensor:
        query, key, value = call.query, call.key, call.value
        scaling, softcap, sliding_window = call.scaling, call.softcap, call.sliding_window
        assert self.book is not None and self.book.step is not None  # begin ran
        step = self.book.step
        valid = None if step.valid is None else step.valid.to(query.device)
        index, new, slots = call.layer, query.shape[2], key.shape[2]
        layer = None if self.cache is None else self.cache.layers[index]
        inv_freq = self.inv_freq[index]
        if layer is not None and layer.thinned and self.renumbers and inv_freq is not None:
            key = layer.moved_keys(step, inv_freq)
        # What is received decides nothing as long as nothing may be evicted, or held less well.
        decides = self.policy.tiers or step.limits is None or step.limits.any
        wanted = layer is not None and self.watches is not None and decides

        if layer is not None and not self.policy.evicts:
            read = layer.reads(step, query, inv_freq)
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
                layer.finish(step, query, inv_freq, sliding_window)
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
            watches = self.watches
            assert watches is not None  # by `wanted`
            if dense and not beyond and softcap is None and new > 1 and kernel.available(query):
                out, received = kernel.attend_and_receive(
                    query, key, value, scaling=scaling, forget=watches.forget, last=watches.last
                )
            else:
                out, received = attend_and_receive(query, key, value, mask, step.gain, scaling=scaling, softcap=softcap)
            layer.receive(received, step)
        else:
            out = attend(query, key, value, mask, causal=causal, scaling=scaling, softcap=softcap)
        if layer is not None:
            layer.finish(step, query, inv_freq, sliding_window)
        return out
