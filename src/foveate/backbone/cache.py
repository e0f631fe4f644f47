"""What a backbone remembers of a text, as transformers' `generate` carries it: the token mixers' own states."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache, CacheLayerMixin

from foveate.backbone.slots import state_bytes


class TextState(CacheLayerMixin):
    """The state of all layers, in one place of transformers' cache."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def keep(self, state: Any, tokens: int) -> None:
        """Hold the state now that `tokens` more went by."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True

    def _each(self, change: Any) -> None:
        if self.state is not None:
            self.state = tree_map(change, self.state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.seen + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in other versions

    def lazy_initialization(self, *args: Any) -> None:
        pass  # the backbone makes the state at the first forward

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a backbone keeps its mixers' own states, and no keys and values can be added to them.")

    def crop(self, *args: Any) -> None:
        raise ValueError("a backbone's state can't forget its last tokens: use no assisted decoding.")

    def offload(self) -> None:
        pass

    def prefetch(self) -> None:
        pass


class MixerCache(Cache):
    """A backbone's cache: `model(ids, use_cache=True).past_key_values`.

    Example:
        >>> import torch
        >>> from foveate.backbone import BackboneConfig, BackboneForCausalLM
        >>> model = BackboneForCausalLM(BackboneConfig(mixer="linear"))
        >>> few, many = (model(torch.ones(1, n, dtype=torch.long), use_cache=True).past_key_values for n in (2, 50))
        >>> few.bytes() == many.bytes(), many.get_seq_length()
        (True, 50)
    """

    def __init__(self) -> None:
        super().__init__(layers=[TextState()])

    @property
    def text(self) -> TextState:
        return self.layers[0]  # type: ignore[return-value]

    def bytes(self) -> int:
        """Bytes that are held."""
        return state_bytes(self.text.state)
