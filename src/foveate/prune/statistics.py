"""What scores of units are made of, measured in one pass over calibration text: inputs of maps, change by sublayers.

Everything is summed in float64. A layer that does not run (skipped, or gone) has no statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foveate.errors import FoveateError
from foveate.methods import UnitScores
from foveate.models.anatomy import LayerParts, anatomy
from foveate.models.surgery import Means, has_attention, has_mlp, unit_counts
from foveate.portable.parts import NoNorm
from foveate.scores.change import sublayer_change as sublayer_change  # pruners import it from here

# ---- what the maps that write to the residual stream read -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one map read, over all calibration tokens; float64 (in features), on the CPU.

    Attributes:
        mean: the mean of each input.
        variance: its variance, divided by the number of tokens.
        norm: its L2 norm over the tokens.
        size: the mean of its absolute value.
        head_norm: of `o`, the mean L2 norm of each query head's output, float64 (heads); of `down`, None.
    """

    mean: Tensor
    variance: Tensor
    norm: Tensor
    size: Tensor
    head_norm: Tensor | None


@torch.no_grad()
def inputs_of(model: PreTrainedModel, calibration: Tensor) -> dict[tuple[int, str], Inputs]:
    """The inputs of `o` (the heads' outputs) and `down` (the MLP's channels) of every layer that runs.

    Args:
        model: the model as it is.
        calibration: token ids, LongTensor (batch, length), without padding.

    Returns:
        (layer, "o" or "down") -> statistics.

    Example:
        >>> import foveate as fv, torch
        >>> from foveate.prune.statistics import inputs_of
        >>> inputs_of(fv.tiny("llama"), torch.arange(1, 65).unsqueeze(0))[0, "down"].variance.shape
        torch.Size([128])
    """
    parts, found = anatomy(model), dict[tuple[int, str], Inputs]()
    with ExitStack() as hooks:
        for layer in parts.layers:
            for role in ("o", "down"):
                module = getattr(layer, role)
                if module is None or not (has_attention(layer) if role == "o" else has_mlp(layer)):
                    continue

                def look(module: nn.Module, args: tuple[Any, ...], key: tuple[int, str] = (layer.index, role)) -> None:
                    x = args[0].detach().flatten(0, -2).double()
                    variance, mean = torch.var_mean(x, dim=0, correction=0)
                    heads = x.unflatten(1, (-1, parts.head_dim)).norm(dim=2).mean(dim=0) if key[1] == "o" else None
                    found[key] = Inputs(
                        mean.cpu(),
                        variance.cpu(),
                        x.norm(dim=0).cpu(),
                        x.abs().mean(dim=0).cpu(),
                        None if heads is None else heads.cpu(),
                    )

                hooks.callback(module.register_forward_pre_hook(look).remove)
        parts.base(calibration, use_cache=False)
    return found


def means_of(model: PreTrainedModel, calibration: Tensor) -> Means:
    """The means of these inputs, as surgery takes them, float32."""
    return {key: inputs.mean.float() for key, inputs in inputs_of(model, calibration).items()}


def column_norms(module: nn.Module | None) -> Tensor:
    """The L2 norm of what a map does with each of its inputs, float64 (in features), on the CPU."""
    return weight_of(module).norm(dim=0)


def weight_of(module: Any) -> Tensor:
    """A map's weight as (out, in), float64, on the CPU."""
    if not isinstance(module, nn.Linear | Conv1D):
        raise FoveateError(
            f"a {type(module).__name__} has no weights that could be scored: prune a model before its parts are "
            "converted."
        )
    weight: Tensor = module.weight.detach().double().cpu()
    return weight.T if isinstance(module, Conv1D) else weight


def column_scores(
    model: PreTrainedModel,
    score: Callable[[LayerParts, str], Tensor | None],
    over_head: Callable[[Tensor], Tensor] = lambda columns: columns.sum(dim=1),
) -> list[UnitScores]:
    """Scores of KV heads and MLP channels out of scores of the inputs of `o` and `down`.

    Args:
        model: the model.
        score: called with each layer and "o" or "down": float (in features), or None where it has none.
        over_head: makes (kv_heads, columns) one number a KV head: the outputs of all query heads that it serves.
    """
    parts = anatomy(model)
    units = []
    for kind, role in (("kv_head", "o"), ("channel", "down")):
        counts = unit_counts(model, kind)
        table = torch.full((len(counts), max(counts, default=0)), torch.nan)
        for layer, count in zip(parts.layers, counts, strict=True):
            columns = score(layer, role) if count else None
            if columns is not None:
                table[layer.index, :count] = (over_head(columns.view(count, -1)) if role == "o" else columns).float()
        units.append(UnitScores(kind, table))
    return [score for score in units if score.scores.numel()]


@torch.no_grad()
def norm_outputs(model: PreTrainedModel, calibration: Tensor) -> Tensor:
    """How large each channel of the residual stream is behind a norm: mean absolute value over tokens, summed over
    all norms of the layers and the last one; float64 (hidden,), on the CPU."""
    parts = anatomy(model)
    total = torch.zeros(parts.hidden, dtype=torch.float64)

    def add(module: nn.Module, args: Any, output: Tensor) -> None:
        total.add_(output.detach().double().abs().flatten(0, -2).mean(dim=0).cpu())

    norms = [norm for layer in parts.layers for norm in layer.norms.values() if not isinstance(norm, NoNorm)]
    norms += [] if parts.final_norm is None else [parts.final_norm]
    with ExitStack() as hooks:
        for norm in norms:
            hooks.callback(norm.register_forward_hook(add).remove)
        parts.base(calibration, use_cache=False)
    return total
