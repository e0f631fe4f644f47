"""What every saved model of an uncommon shape is built with: its layers' widths, and what stands for a part that left.

This file travels with saved models: torch and transformers are all it needs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def resized(module: nn.Module, shapes: dict[str, list[int] | None]) -> nn.Module:
    """A module like the given one whose parameters have other shapes, still to be filled.

    Args:
        module: a linear map, an embedding or a norm; it stays as it is.
        shapes: parameter -> shape, or None where the new module has no such parameter.
    """
    new = copy.copy(module)
    model_parameters = dict(module._parameters)
    new._parameters, new._buffers = dict(model_parameters), dict(module._buffers)
    like = next(p for p in model_parameters.values() if p is not None)
    for name, shape in shapes.items():
        if shape is None:
            new._parameters[name] = None
        else:
            empty = torch.empty(shape, dtype=like.dtype, device=like.device)
            new._parameters[name] = nn.Parameter(empty, requires_grad=like.requires_grad)
    _tell_sizes(new)
    return new


def _tell_sizes(module: Any) -> None:
    """The attributes in which modules keep the sizes of their weight, where they have them."""
    rows, columns = module.weight.shape if module.weight.ndim == 2 else (module.weight.shape[0],) * 2
    if hasattr(module, "nf"):  # transformers' Conv1D: (in, out)
        module.nx, module.nf = rows, columns
    sizes = {
        "in_features": columns,
        "out_features": rows,
        "num_embeddings": rows,
        "embedding_dim": columns,
        "normalized_shape": (rows,),
    }
    for name, size in sizes.items():
        if hasattr(module, name):
            setattr(module, name, size)


class OwnConfig:
    """The model's configuration as one module sees it: some values are its own, the rest is the model's at any time.

    So a module with fewer heads still follows when the model is told to attend by another implementation.
    """

    def __init__(self, config: Any, own: dict[str, Any]):
        vars(self).update(own, _config=config, _own=tuple(own))

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_own") or name.startswith("__"):  # a copy in the making
            raise AttributeError(name)
        return getattr(self._config, name)

    @property
    def own(self) -> dict[str, Any]:
        """What differs from the model's."""
        return {name: getattr(self, name) for name in self._own}


def set_heads(attention: Any, heads: int, kv_heads: int) -> None:
    """Tell an attention module how many heads its projections have now."""
    if hasattr(attention, "config"):
        config = attention.config
        own = {"num_attention_heads": heads}
        if hasattr(config, "num_key_value_heads"):
            own["num_key_value_heads"] = kv_heads
        attention.config = OwnConfig(config._config if isinstance(config, OwnConfig) else config, own)
    sizes = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_key_value_groups": heads // kv_heads,
    }
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)
    if hasattr(attention, "split_size"):  # GPT-2
        attention.split_size = heads * attention.head_dim


class NoAttention(nn.Module):
    """Stands where an attention sublayer was, and adds nothing to the residual stream, or a constant.

    A cache is told of the tokens that went by, one number each, since transformers reads the number of tokens seen
    off one layer. A cache that bears layers which hold nothing (its attribute `bears_gaps`) is left alone.

    Args:
        layer_idx: the layer.
        size: the width of the constant, a parameter `value`; None: nothing is added.
    """

    def __init__(self, layer_idx: int, size: int | None = None):
        super().__init__()
        self.layer_idx, self.size = layer_idx, size
        self.value = None if size is None else nn.Parameter(torch.empty(size))

    @property
    def settings(self) -> dict[str, Any]:
        return {"layer_idx": self.layer_idx, "size": self.size}

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        cache: Any = None,  # this and the next two: what transformers has called it, from the newest on
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache = next((each for each in (cache, past_key_values, layer_past) if each is not None), None)
        if cache is not None and not getattr(cache, "bears_gaps", False):
            mark = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(mark, mark, self.layer_idx)
        return _constant(self.value, hidden_states), None


def _constant(value: Tensor | None, like: Tensor) -> Tensor:
    """What a sublayer that left adds to the residual stream; one number where that is zero."""
    return like.new_zeros(()) if value is None else value.to(like.dtype)


class NoMlp(nn.Module):
    """Stands where an MLP was, and adds nothing to the residual stream, or a constant (see `NoAttention`)."""

    def __init__(self, size: int | None = None):
        super().__init__()
        self.size = size
        self.value = None if size is None else nn.Parameter(torch.empty(size))

    @property
    def settings(self) -> dict[str, Any]:
        return {"size": self.size}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _constant(self.value, hidden_states)


class NoNorm(nn.Module):
    """Stands where a norm was whose sublayer left."""

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def build(model: Any, thin: dict[str, Any], classes: dict[str, type]) -> None:
    """Give a stock model the shape that its configuration tells of.

    Args:
        model: the stock model, its weights still to be read.
        thin: `modules`: path -> [class, settings], or ["resized", parameter -> shape]; `attributes`: path -> plain
            attributes of a module that differ from the stock model's; `configs`: path -> values of the configuration
            that differ for this module.
        classes: the portable classes, by name.
    """
    for path, (name, settings) in thin["modules"].items():
        old = model.get_submodule(path)
        if name == "resized":
            new = resized(old, settings)
        else:
            cls = classes[name]
            extra = {"config": model.config} if "config" in inspect.signature(cls).parameters else {}
            new = cls(**settings, **extra)
        owner, _, last = path.rpartition(".")
        setattr(model.get_submodule(owner), last, new)
    for path, values in thin["attributes"].items():
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)
    for path, values in thin["configs"].items():
        model.get_submodule(path).config = OwnConfig(model.config, values)
    for module in list(model.modules()):
        if hasattr(module, "settings") and hasattr(module, "tie"):
            module.tie(model)


@contextmanager
def told(config: Any, values: dict[str, Any]) -> Iterator[None]:
    """A configuration with other values while the block lasts."""
    before = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


class Thin:
    """Mixed into a stock model's class: what is built has the shape that `config.thin` tells of (see `build`).

    `config.thin["skeleton"]` holds values under which the stock class is built first, where it can't be built under
    the model's own, such as a width that its heads don't divide.

    Class attributes: `portable`, the portable classes by name.
    """

    portable: dict[str, type] = {}

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        with told(config, config.thin["skeleton"]):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        build(self, config.thin, self.portable)
        self.post_init()  # type: ignore[attr-defined]  # ties what was replaced
