"""How much layers, attention sublayers and MLPs change the residual stream: what pruners spend and a probe shows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.models.anatomy import LayerParts, anatomy
from foveate.models.surgery import has_attention, has_mlp

CHANGED = ("attention", "mlp", "layer")
"""What changes the residual stream."""


def turned(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine between two values of the residual stream, (..., hidden): float32 (...), on their device.

    Example:
        >>> turned(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])).tolist()
        [1.0, 0.0]
    """
    return 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)


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
        >>> change = sublayer_change(fv.tiny("llama"), torch.arange(1, 65).unsqueeze(0))
        >>> {kind: tuple(scores.shape) for kind, scores in change.items()}
        {'attention': (4, 1), 'mlp': (4, 1), 'layer': (4, 1)}
    """
    change = {kind: torch.full((len(anatomy(model).layers), 1), torch.nan) for kind in CHANGED}

    def see(layer: LayerParts, x: Tensor, y: Tensor, added: dict[str, Tensor], norms: dict[str, nn.Module]) -> None:
        for kind, value in changes(x, y, added).items():
            change[kind][layer.index] = value.double().mean().float().cpu()

    _watched(model, calibration, see)
    return change


def changes(x: Tensor, y: Tensor, added: dict[str, Tensor]) -> dict[str, Tensor]:
    """How much a layer and its sublayers turned each token's residual stream.

    Args:
        x, y: the stream before and after the layer, (..., hidden).
        added: what "attention" and "mlp" added, where the layer has them; empty: the layer did not run.

    Returns:
        kind -> float32 (...), of the kinds that are there.
    """
    found = {}
    if "attention" in added:
        found["attention"] = turned(x, x + added["attention"])
    if "mlp" in added:
        found["mlp"] = turned(y - added["mlp"].view_as(y), y)
    if added:
        found["layer"] = turned(x, y)
    return found


def norms_after(model: PreTrainedModel) -> list[dict[str, nn.Module]]:
    """For each layer, the norm that makes what is added of what a sublayer puts out, by "attention" and "mlp".

    Found by a forward of one token.

    Example:
        >>> import foveate as fv
        >>> [len(norms) for norms in norms_after(fv.tiny("gemma2"))], [len(n) for n in norms_after(fv.tiny("llama"))]
        ([2, 2, 2, 2], [0, 0, 0, 0])
    """
    found: list[dict[str, nn.Module]] = [{} for _ in anatomy(model).layers]

    def see(layer: LayerParts, x: Tensor, y: Tensor, added: dict[str, Tensor], norms: dict[str, nn.Module]) -> None:
        found[layer.index] = norms

    _watched(model, torch.zeros(1, 1, dtype=torch.long), see)
    return found


See = Callable[[LayerParts, Tensor, Tensor, dict[str, Tensor], dict[str, nn.Module]], None]
"""Called once a layer: the layer, the stream before and after it, what its sublayers added, the norms after them."""


@torch.no_grad()
def _watched(model: PreTrainedModel, ids: Tensor, see: See) -> None:
    """Read token ids (batch, length), and show what happens in each layer."""
    parts = anatomy(model)
    seen: dict[str, Any] = {}
    added: dict[str, Tensor] = {}
    norms: dict[str, nn.Module] = {}

    def at_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    def after(kind: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen["last"], seen["out"] = kind, output[0] if isinstance(output, tuple) else output
            added[kind] = seen["out"]

        return hook

    def after_norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if args and args[0] is seen.get("out"):
            added[seen["last"]], norms[seen["last"]] = output, module

    with ExitStack() as hooks:
        for layer in parts.layers:

            def after_layer(module: nn.Module, args: Any, output: Any, layer: LayerParts = layer) -> None:
                y = output[0] if isinstance(output, tuple) else output
                see(layer, seen["x"], y, dict(added), dict(norms))
                for each in (seen, added, norms):
                    each.clear()

            hooks.callback(layer.module.register_forward_pre_hook(at_layer, with_kwargs=True).remove)
            if has_attention(layer):
                hooks.callback(layer.attention.register_forward_hook(after("attention")).remove)
            if (mlp := layer.mlp if layer.mlp is not None else layer.down) is not None and has_mlp(layer):
                hooks.callback(mlp.register_forward_hook(after("mlp")).remove)
            for norm in layer.norms.values():
                hooks.callback(norm.register_forward_hook(after_norm).remove)
            hooks.callback(layer.module.register_forward_hook(after_layer).remove)
        parts.base(ids.to(model.device), use_cache=False)
