"""What a state costs in quality: how far the model's predictions are from the original's, on calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.methods import apply
from foveate.models.anatomy import anatomy
from foveate.tasks.base import read

CHUNKS = 8
"""Pieces that a passage is read in where a cache policy is in force, which acts between them."""


class Loss:
    """The KL divergence of a live model's predictions from the original's, in nats a token.

    The original's probabilities stay in memory: float32, one number for each token and entry of the vocabulary.

    Args:
        model: the live model; at this moment the original.
        ids: token ids (batch, length) of calibration text.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor):
        self.model, self.ids = model, ids
        self._layers = [layer.module for layer in anatomy(model).layers]
        self._entered: list[Tensor] = []
        logits = self.remember()
        self._original = logits.float().softmax(-1).flatten(0, 1)
        self._least = self._cross(logits)

    @torch.no_grad()
    def remember(self) -> Tensor:
        """Keep what enters each layer now, for `of` to start from; the logits (batch, length, vocabulary)."""
        entered: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as hooks:
            for layer in self._layers:
                hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            logits: Tensor = self.model(self.ids, use_cache=False).logits
        self._entered = entered
        return logits

    @torch.no_grad()
    def of(self, first: int = 0, cache: str = "") -> float:
        """Nats a token.

        Args:
            first: the first layer that is another than when `remember` was called; those before it are not run.
            cache: a recipe for the cache; the passages are then read in pieces.
        """
        if cache:
            logits = self._in_pieces(cache)
        else:
            with self._from(first):
                logits = self.model(self.ids, use_cache=False).logits
        return (self._cross(logits) - self._least) / self.ids.numel()

    @torch.no_grad()
    def _cross(self, logits: Tensor) -> float:
        """The cross entropy of the original's predictions and of these, in nats.

        Its excess over that of the original with itself is the KL divergence, which would need another pass over the
        vocabulary; where that is large, half of a step's time goes into this.
        """
        cross = 0.0
        for was, now in _rows(self._original, logits.flatten(0, 1)):
            now = now.float() - now.float().amax(-1, keepdim=True)
            cross += float((now.logsumexp(-1) - torch.linalg.vecdot(was, now)).double().sum())
        return cross

    def _in_pieces(self, cache: str) -> Tensor:
        length = self.ids.shape[1]
        with apply(self.model, cache, context=length):
            pieces, held = [], None
            for piece in self.ids.split(max(1, length // CHUNKS), dim=1):
                logits, held = read(self.model, piece, held)
                pieces.append(logits)
        return torch.cat(pieces, dim=1)

    @contextmanager
    def _from(self, first: int) -> Iterator[None]:
        """A forward inside starts at a layer, on what entered it when `remember` was called."""
        # Where somebody else's forward stands on a layer (accelerate's, say), all layers run: slower, and the same.
        if first == 0 or any("forward" in vars(layer) for layer in self._layers):
            yield
            return
        given = self._entered[first]

        def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((given, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": given})

        hook = self._layers[first].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            for layer in self._layers[:first]:
                layer.forward = pass_on  # type: ignore[method-assign]
            yield
        finally:
            hook.remove()
            for layer in self._layers[:first]:
                vars(layer).pop("forward", None)


def _rows(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few tokens at a time, so that what is made on the way stays small."""
    return zip(a.split(64), b.split(64), strict=True)
