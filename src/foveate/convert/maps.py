"""The linear maps of a model's decoder layers, for techniques that replace them one by one."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foveate.errors import FoveateError
from foveate.models.anatomy import Anatomy
from foveate.models.family import families
from foveate.portable.parts import NoMlp, NoNorm

ROLES = {"attention": ("q", "k", "v", "qkv", "o"), "mlp": ("gate", "up", "gate_up", "down")}
"""The maps of each sublayer, by their names in `LayerParts`."""


@dataclass(frozen=True)
class LinearMap:
    """One linear map of a decoder layer.

    Attributes:
        path: where it is, from the model.
        layer: index of the layer.
        role: its name in `LayerParts`: "q", "down" ...
        module: a `Linear`, or transformers' `Conv1D`.
    """

    path: str
    layer: int
    role: str
    module: Any

    @property
    def weight(self) -> Tensor:
        """(out, in), detached, on the module's device."""
        return weight_of(self.module)


def weight_of(module: Any) -> Tensor:
    """The weight of a linear map as (out, in), detached."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def linear_maps(parts: Anatomy, which: str, who: str, layers: Container[int] | None = None) -> list[LinearMap]:
    """The linear maps of the layers, in order.

    Args:
        parts: of the model.
        which: "all", "attention" or "mlp".
        who: the technique, for errors.
        layers: indices of layers; None: all.

    Raises:
        FoveateError: there is no such choice; a map has been converted already; there are no maps.

    Example:
        >>> import foveate as fv
        >>> maps = linear_maps(fv.anatomy(fv.tiny("gpt2")), "mlp", "low-rank")
        >>> maps[0].path, maps[0].weight.shape, len(maps)
        ('transformer.h.0.mlp.c_fc', torch.Size([128, 64]), 8)
    """
    check_which(which, who)
    roles = [role for sort, names in ROLES.items() if which in ("all", sort) for role in names]
    holder, maps = families()[parts.family].layers, []
    for layer in parts.layers:
        if layers is not None and layer.index not in layers:
            continue
        for role in roles:
            module = getattr(layer, role)
            if module is None or isinstance(module, NoMlp | NoNorm):  # the sublayer has left, or is a foreign one
                continue
            path = f"{holder}.{layer.index}.{layer.names[role]}"
            if not isinstance(module, nn.Linear | Conv1D):
                raise FoveateError(
                    f"{who}: {path} is a {type(module).__name__} already: convert the maps of a model once, with one "
                    "technique for each."
                )
            maps.append(LinearMap(path, layer.index, role, module))
    if not maps:
        raise FoveateError(f"{who}: no such layer of this model has linear maps of the sort {which!r}.")
    return maps


def check_which(which: str, who: str) -> None:
    """Raise unless `which` names a choice of maps."""
    if which not in ("all", *ROLES):
        raise FoveateError(f"{who}: maps={which} is no choice: give all, {' or '.join(ROLES)}.")


def like(new: nn.Module, old: Any) -> Any:
    """A new module with the dtype, the device and the mode of the map that it replaces."""
    weight = old.weight
    new.to(weight.device, weight.dtype).train(old.training).requires_grad_(weight.requires_grad)
    return new
