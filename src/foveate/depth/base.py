"""The depth role: which layers run. A technique plans; skipping and keeping positions right are here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.methods import Method, Target
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.caches import partial_cache


class DepthPlan(Method):
    """Base of techniques that run the same layers for every token. A technique writes `plan`."""

    role: ClassVar[str] = "depth"

    @abstractmethod
    def plan(self, parts: Anatomy) -> list[int]:
        """Indices of the layers that run, ascending."""

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        parts = anatomy(target.model)
        run = set(self.plan(parts))
        skipped = [layer.module for layer in parts.layers if layer.index not in run]
        with ExitStack() as stack:
            if skipped:
                stack.enter_context(partial_cache(target.model))
            for module in skipped:
                stack.enter_context(_passed_through(module, self.name))
            yield


@contextmanager
def _passed_through(layer: nn.Module, who: str) -> Iterator[None]:
    """The decoder layer hands on the hidden states as they are; its weights stay."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    if "forward" in vars(layer):
        raise FoveateError(f"{who}: a layer's forward has been replaced already, by a hook or another method.")
    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward
