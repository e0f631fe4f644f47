"""Attention shared between layers: one layer attends, and others use its attention on values of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .rotary import RotaryAttention, rotated


class SharingAttention(RotaryAttention):
    """A layer's own attention, which hands its queries and keys to the layers that echo it.

    Args:
        echoes: how many layers do. After the last of them has run, nothing is held.
        config, **settings: as in `RotaryAttention`.
    """

    plain_entries: ClassVar[bool] = False  # a layer that echoes it needs all keys as they are

    def __init__(self, echoes: int, config: Any = None, **settings: Any):
        super().__init__(config=config, **settings)
        self.echoes = echoes
        self._shared: list[tuple[Tensor, Tensor]] = []  # queries and keys, once for each echo that is to come

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "echoes": self.echoes}

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,  # what transformers calls it from 5.24 on
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query = rotated(self.heads_of(hidden_states, "q"), *position_embeddings)
        key = rotated(self.heads_of(hidden_states, "k"), *position_embeddings)
        value = self.heads_of(hidden_states, "v")
        if (cache := past_key_values if cache is None else cache) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        self._shared = [(query, key)] * self.echoes
        out, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(out.flatten(-2)), weights

    def hand_over(self, who: int) -> tuple[Tensor, Tensor]:
        """Queries (batch, head, query, head_dim) and keys (batch, kv_head, entry, head_dim), for layer `who`."""
        if not self._shared:
            raise RuntimeError(
                f"layer {who} echoes the attention of layer {self.layer_idx}, which has not run just before it: don't "
                "skip or drop that layer, and train without gradient checkpointing."
            )
        return self._shared.pop()


class EchoAttention(RotaryAttention):
    """Attends as an earlier layer did, over its own values: with that layer's queries and keys, and none of its own.

    That is the same as using that layer's attention weights once more, but they are never written out. The cache holds
    values; for keys it holds one number a KV head, since transformers reads the number of tokens seen off them.

    Args:
        source: index of the layer that is echoed.
        config, **settings: as in `RotaryAttention`.
    """

    maps: ClassVar[str] = "vo"
    plain_entries: ClassVar[bool] = False

    def __init__(self, source: int, config: Any = None, **settings: Any):
        super().__init__(config=config, **settings)
        self._source: int | tuple[SharingAttention] = source

    @property
    def settings(self) -> dict[str, Any]:
        source = self._source if isinstance(self._source, int) else self._source[0].layer_idx
        return {**super().settings, "source": source}

    def tie(self, model: Any) -> None:
        """Find the module that is echoed."""
        source = self.settings["source"]
        for module in model.modules():
            if isinstance(module, SharingAttention) and module.layer_idx == source:
                self._source = (module,)
                return
        raise RuntimeError(f"layer {self.layer_idx} echoes the attention of layer {source}, which shares none.")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,  # what transformers calls it from 5.24 on
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(self._source, tuple)  # tied
        query, key = self._source[0].hand_over(self.layer_idx)
        value = self.heads_of(hidden_states, "v")
        if (cache := past_key_values if cache is None else cache) is not None:
            mark = value.new_zeros(*value.shape[:-1], 1)
            _, value = cache.update(mark, value, self.layer_idx)
        out, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(out.flatten(-2)), weights
