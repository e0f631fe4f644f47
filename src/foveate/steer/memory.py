"""What a technique remembers of a text, beside the cache: it follows the cache's rows, and is gone with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from foveate.errors import FoveateError
from foveate.models.caches import PartialCache, replaced_cache


class RememberingCache(PartialCache):
    """The model's own cache, each layer of which has a `state`: tensors by name, with batch first."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._forget()

    def _rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        layers: list[Any] = self.layers
        for layer in layers:
            layer.state = {name: pick(tensor) for name, tensor in layer.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        super().reset()
        self._forget()

    def _forget(self) -> None:
        layers: list[Any] = self.layers
        for layer in layers:
            layer.state = {}

    def crop(self, tokens_to_remove: int) -> None:
        raise FoveateError(
            "tokens were to be taken back from the cache (as assisted generation does), but a steering technique can't "
            "forget what it has seen of them: generate without an assistant, or leave the technique's block."
        )


class Memory:
    """Where a technique's state is, in the forward that runs: on the cache in use, or nowhere for long."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def begin(self, cache: Cache | None, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()) else None

    def valid(self, hidden: Tensor) -> Tensor | None:
        """Of the tokens of this forward, (batch, token, ...), which are real: bool (batch, token); None = all."""
        return None if self.mask is None else self.mask[:, -hidden.shape[1] :].to(hidden.device)

    def state(self, cache: Cache | None, layer: int) -> dict[str, Tensor]:
        """The state beside a layer's entries; without a cache, a new one that nobody will read."""
        if cache is None:
            return {}
        state = getattr(cache.layers[layer], "state", None)
        if state is None:
            raise FoveateError(
                f"a {type(cache).__name__} can't keep what a steering technique remembers: leave out "
                "cache_implementation and past_key_values, or start from the prompt inside the `with` block."
            )
        return state


@contextmanager
def remembering(model: PreTrainedModel) -> Iterator[Memory]:
    """While in force, caches have room for a technique's state. A cache policy's cache has it already."""
    memory = Memory()
    with replaced_cache(
        model,
        make=lambda: RememberingCache(config=model.config),
        replaces=lambda cache: type(cache) in (DynamicCache, PartialCache),
        before=memory.begin,
    ):
        yield memory


def cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a layer or an attention module; families differ in where it stands."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
