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


# ---- how much a sublayer changes ------------------------------------------------------------------------------------


@torch.no_grad()
def sublayer_change(model: PreTrainedModel, calibration: Tensor) -> dict[str, Tensor]:
    """1 - cosine between the residual stream before and after each part of a layer, averaged over tokens.

    What a sublayer adds to the residual stream is its output, or what a norm right after it makes of it (Gemma 2,
    OLMo 2): so a norm that is given the very tensor that the sublayer returned has the last word. An MLP's stream
    before it is the layer's output without what the MLP added; so where both run side by side (GPT-NeoX), the
    attention's part counts as there already.

    Args:
        model: the model as it is.
        calibration: token ids, LongTensor (batch, length), without padding.

    Returns:
        "attention", "mlp", "layer" -> float32 (layers, 1); NaN where the sublayer is gone, or doesn't run.

    Example:
        >>> import foveate as fv, torch
        >>> from foveate.prune.statistics import sublayer_change
        >>> change = sublayer_change(fv.tiny("llama"), torch.arange(1, 65).unsqueeze(0))
        >>> {kind: tuple(scores.shape) for kind, scores in change.items()}
        {'attention': (4, 1), 'mlp': (4, 1), 'layer': (4, 1)}
    """
    parts = anatomy(model)
    change = {kind: torch.full((len(parts.layers), 1), torch.nan) for kind in ("attention", "mlp", "layer")}
    seen: dict[str, Any] = {}

    def at_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    def after_attention(module: nn.Module, args: Any, output: Any) -> None:
        seen["last"], seen["out"] = "attention", output[0]
        seen["attention"] = output[0]

    def after_mlp(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["last"], seen["out"] = "mlp", output
        seen["mlp"] = output

    def after_norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if args and args[0] is seen.get("out"):
            seen[seen["last"]] = output

    def turned(before: Tensor, after: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1).double().mean().float().cpu()

    with ExitStack() as hooks:
        for layer in parts.layers:

            def after_layer(module: nn.Module, args: Any, output: Any, index: int = layer.index) -> None:
                x, y = seen["x"], output[0] if isinstance(output, tuple) else output
                if "attention" in seen:
                    change["attention"][index] = turned(x, x + seen["attention"])
                if "mlp" in seen:
                    change["mlp"][index] = turned(y - seen["mlp"].view_as(y), y)
                if "out" in seen:  # else the whole layer was skipped
                    change["layer"][index] = turned(x, y)
                seen.clear()

            hooks.callback(layer.module.register_forward_pre_hook(at_layer, with_kwargs=True).remove)
            if has_attention(layer):
                hooks.callback(layer.attention.register_forward_hook(after_attention).remove)
            if (mlp := layer.mlp if layer.mlp is not None else layer.down) is not None and has_mlp(layer):
                hooks.callback(mlp.register_forward_hook(after_mlp).remove)
            for norm in layer.norms.values():
                hooks.callback(norm.register_forward_hook(after_norm).remove)
            hooks.callback(layer.module.register_forward_hook(after_layer).remove)
        parts.base(calibration, use_cache=False)
    return change
