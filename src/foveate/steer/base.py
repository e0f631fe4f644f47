"""The steer role: attention weights or the residual stream, changed at inference. A technique writes `adjust`.

`attention.py` makes the weights that are adjusted; `memory.py` keeps what a technique remembers of a text beside the
cache, so that a text read token by token is steered as in one forward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.methods import Method, Target
from foveate.models.anatomy import Anatomy, anatomy
from foveate.steer.attention import AttentionView, steered_attention
from foveate.steer.memory import cache_in, remembering


class Steer(Method):
    """Base of techniques that correct attention or what comes of it; the model's weights stay as they are."""

    role: ClassVar[str] = "steer"


class AttentionSteer(Steer):
    """Base of techniques that change attention weights. A technique writes `heads`, and `adjust`.

    Attention is made as the model makes it, or as the cache policy in force does; then the outputs of the chosen heads
    are made again with adjusted weights. Weights are made for a block of queries at a time, so that memory grows
    linearly with the entries.
    """

    @abstractmethod
    def heads(self, target: Target, parts: Anatomy) -> Tensor:
        """Which heads are adjusted: bool (layer, head)."""

    @abstractmethod
    def adjust(self, view: AttentionView) -> Tensor:
        """New weights for the old, in the shape of `view.weights`."""

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        parts = anatomy(target.model)
        chosen = self.heads(target, parts)
        with self.steering(parts, {i: row.nonzero()[:, 0] for i, row in enumerate(chosen) if row.any()}, self.adjust):
            yield

    @contextmanager
    def steering(
        self, parts: Anatomy, heads: dict[int, Tensor], adjust: Callable[[AttentionView], Tensor]
    ) -> Iterator[None]:
        """While in force, `adjust` has the last word on the weights of these heads: int (head,), by layer."""
        with ExitStack() as stack:
            if heads:
                memory = stack.enter_context(remembering(parts.model))
                for index, which in heads.items():
                    stack.enter_context(steered_attention(self.name, parts, index, which, adjust, memory))
            yield


@dataclass
class ResidualView:
    """What a technique sees before a layer runs.

    Attributes:
        layer: index of the layer that runs next.
        hidden: (batch, token, hidden): its input.
        captured: the inputs of the layers asked for, by index, of the same tokens and shape.
        valid: (batch, token), bool: False for padding; None = no padding.
        state: what the technique keeps of each sequence from forward to forward, by name: tensors with batch first.
    """

    layer: int
    hidden: Tensor
    captured: dict[int, Tensor]
    valid: Tensor | None
    state: dict[str, Tensor]


class ResidualSteer(Steer):
    """Base of techniques that change the residual stream before a layer. A technique writes `residual`."""

    @abstractmethod
    def residual(self, target: Target, parts: Anatomy) -> tuple[int, list[int], Callable[[ResidualView], Tensor]]:
        """The layer before which the residual stream is changed, the layers (up to that one) whose inputs are captured,
        and `adjust(view)`, which gives the new residual stream in the shape of `view.hidden`."""

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        parts = anatomy(target.model)
        with reinjected(self.name, parts, *self.residual(target, parts)):
            yield


@contextmanager
def reinjected(
    who: str, parts: Anatomy, at: int, capture: list[int], adjust: Callable[[ResidualView], Tensor]
) -> Iterator[None]:
    """While in force, `adjust` changes the input of layer `at`, with the inputs of the captured layers at hand."""
    last = len(parts.layers) - 1
    if not (0 <= at <= last and capture and all(0 <= layer <= at for layer in capture)):
        raise FoveateError(
            f"{who}: layers {capture} were to be captured and mixed in at layer {at}, but this model's layers are 0 to "
            f"{last}, and what is mixed in must have been computed by then: capture layers up to {at}."
        )
    captured: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def mix(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        state = memory.state(cache_in(args, kwargs), at)
        new = adjust(ResidualView(at, hidden, dict(captured), memory.valid(hidden), state)).to(hidden.dtype)
        captured.clear()
        return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": new})

    with ExitStack() as hooks:
        memory = hooks.enter_context(remembering(parts.model))
        for layer in capture:
            hooks.callback(parts.layers[layer].module.register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        hooks.callback(parts.layers[at].module.register_forward_pre_hook(mix, with_kwargs=True).remove)
        yield
