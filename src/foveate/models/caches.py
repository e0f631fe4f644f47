"""Caches: what they really hold in bytes, and how one is put in place of the model's own."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from foveate.errors import FoveateError
from foveate.models.anatomy import anatomy

CACHE = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"
"""What models call the argument that is the cache."""


def with_cache(cache: Any) -> dict[str, Any]:
    """A cache as an argument of a model's forward, under the name that this version of transformers has for it.

    Example:
        >>> import torch, foveate as fv
        >>> model, ids = fv.tiny("llama"), torch.arange(1, 11).unsqueeze(0)
        >>> cache = model(ids, use_cache=True).past_key_values
        >>> model(ids, **with_cache(cache)).past_key_values.get_seq_length()
        20
    """
    return {CACHE: cache}


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache really holds: the storage behind every tensor of every layer, bookkeeping included.

    Example:
        >>> import torch, foveate as fv
        >>> out = fv.tiny("llama")(torch.arange(1, 11).unsqueeze(0), use_cache=True)
        >>> cache_bytes(out.past_key_values) == full_cache_bytes(fv.tiny("llama"), 10)
        True
    """
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for value in _tensors(vars(layer)):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(parts: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors of more than one number among an object's parts, and among the parts of its data classes."""
    for value in parts.values():
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _tensors(vars(value))


def full_cache_bytes(model: PreTrainedModel, tokens: int, *, batch: int = 1) -> int:
    """Bytes that the unchanged model's own cache needs for `tokens` tokens, in the model's dtype.

    Layers with an attention window of their own count with the entries that this window needs.
    """
    parts = anatomy(model)
    entry = 2 * parts.kv_heads * parts.head_dim * model.dtype.itemsize
    held = sum(min(tokens, (layer.sliding_window or tokens + 1) - 1) for layer in parts.layers)
    return batch * held * entry


@contextmanager
def replaced_cache(
    model: PreTrainedModel,
    make: Callable[[], Cache],
    replaces: Callable[[Any], bool],
    before: Callable[[Cache | None, dict[str, Any]], None] = lambda cache, inputs: None,
    after: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """While in force, a forward that would start on the model's own empty cache starts on `make()` instead.

    A caller who made that empty cache and passes it in again is given the same replacement again.

    Args:
        model: the model whose decoder is hooked.
        make: a new, empty cache.
        replaces: whether a given cache is to be replaced.
        before: called before each forward with the cache in use (None without one) and the decoder's inputs by name.
        after: called after each forward.
    """
    stand_ins: weakref.WeakKeyDictionary[Cache, Cache] = weakref.WeakKeyDictionary()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        if args:  # only the token ids are ever positional
            kwargs = {**kwargs, "input_ids": args[0]}
        name = next((each for each in ("cache", "past_key_values") if each in kwargs), CACHE)
        cache: Any = kwargs.get(name)
        use_cache = kwargs.get("use_cache")
        if cache is None and (model.config.use_cache if use_cache is None else use_cache):
            cache = make()
        elif cache in stand_ins:
            cache = stand_ins[cache]
        elif cache is not None and replaces(cache):
            if cache.get_seq_length() > 0:
                raise FoveateError(
                    f"the {type(cache).__name__} passed in was filled before the recipe was applied, so its entries "
                    "can't be put under the recipe: start from the prompt inside the `with` block."
                )
            stand_ins[cache] = cache = make()
        before(cache, kwargs)
        return (), {**kwargs, name: cache}

    decoder = anatomy(model).base
    handles = [
        decoder.register_forward_pre_hook(enter, with_kwargs=True),
        decoder.register_forward_hook(lambda *_: after()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PartialCache(DynamicCache):
    """The model's own cache where some layers hold nothing: lengths are read off the layers that do.

    Transformers reads the number of tokens seen, and the sizes of masks, off one layer (the first of its sort); where
    just that layer is skipped or has lost its attention, every position after the first forward would be wrong.
    """

    bears_gaps = True  # see NoAttention

    def _stand_in(self, layer_idx: int) -> int:
        layers: list[Any] = self.layers
        if layer_idx < len(layers) and not layers[layer_idx].is_initialized:
            sort = getattr(layers[layer_idx], "is_sliding", False)
            filled = [i for i, layer in enumerate(layers) if layer.is_initialized]
            return next((i for i in filled if getattr(layers[i], "is_sliding", False) == sort), next(iter(filled), 0))
        return layer_idx

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._stand_in(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._stand_in(layer_idx))


def partial_cache(model: PreTrainedModel) -> Any:
    """Context manager: the model works with a cache that bears layers which hold nothing."""
    return replaced_cache(
        model,
        make=lambda: PartialCache(config=model.config),
        replaces=lambda cache: type(cache) is DynamicCache,
    )
