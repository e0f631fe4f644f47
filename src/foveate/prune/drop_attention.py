"""Dropping whole attention sublayers that hardly change the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.methods import Paper, UnitScores, method
from foveate.models.anatomy import anatomy
from foveate.prune.base import Pruner


@method("drop-attention")
class DropAttention(Pruner):
    """Remove the attention sublayers whose output, residual included, is most like their input.

    A sublayer's score is 1 - cos(x, x + Attention(Norm(x))), averaged over calibration tokens (section 3 of the
    paper); the lowest scores leave in one shot, their weights and their part of the cache with them.

    Fields: `keep`, the fraction of attention sublayers that stay.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> whole = sum(p.numel() for p in model.parameters())
        >>> with fv.apply(model, "drop-attention:keep=0.5", calibration=torch.arange(1, 65).unsqueeze(0)):
        ...     sum(p.numel() for p in model.parameters()) < whole
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "What Matters in Transformers? Not All Attention is Needed", 2024, "https://arxiv.org/abs/2406.15786"
    )
    claim: ClassVar[str] = "many attention sublayers can leave with little loss, and the cache shrinks with them"

    def score(self, model: PreTrainedModel, calibration: Tensor) -> UnitScores:
        return UnitScores("attention", attention_change(model, calibration))

    @contextmanager
    def removed(self, model: PreTrainedModel, drop: Tensor) -> Iterator[None]:
        gone = [layer for layer in anatomy(model).layers if drop[layer.index, 0]]
        for layer in gone:
            setattr(layer.module, layer.attention_name, NoAttention())
        try:
            yield
        finally:
            for layer in gone:
                setattr(layer.module, layer.attention_name, layer.attention)


class NoAttention(nn.Module):
    """Stands where an attention sublayer was, and adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


@torch.no_grad()
def attention_change(model: PreTrainedModel, calibration: Tensor) -> Tensor:
    """1 - cosine between each attention sublayer's input and output with residual, float32 (layers, 1).

    What a sublayer adds to the residual stream is its output, or what a norm right after it makes of it (Gemma 2,
    OLMo 2): so a norm that is given the very tensor that the attention returned has the last word.
    """
    parts = anatomy(model)
    change = torch.zeros(len(parts.layers), 1)
    seen: dict[str, Tensor] = {}
    handles = []

    def watch(index: int, layer: Any) -> None:
        def at_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["x"] = args[0] if args else kwargs["hidden_states"]

        def at_attention(module: nn.Module, args: Any, output: Any) -> None:
            seen["out"] = seen["added"] = output[0]

        def at_norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if args and args[0] is seen.get("out"):
                seen["added"] = output

        def after_layer(module: nn.Module, args: Any, output: Any) -> None:
            x, y = seen["x"].float(), (seen["x"] + seen["added"]).float()
            change[index, 0] = 1 - torch.cosine_similarity(x, y, dim=-1).mean().cpu()
            seen.clear()

        handles.append(layer.module.register_forward_pre_hook(at_layer, with_kwargs=True))
        handles.append(layer.attention.register_forward_hook(at_attention))
        handles.extend(norm.register_forward_hook(at_norm) for norm in layer.norms.values())
        handles.append(layer.module.register_forward_hook(after_layer))

    try:
        for layer in parts.layers:
            watch(layer.index, layer)
        parts.base(calibration, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return change
