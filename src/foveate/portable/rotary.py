"""What attention modules with rotary positions share: maps, rotation, and the way to transformers' attention.

For families with maps q, k, v and o of their own and heads rotated as two halves: Llama, Mistral, Qwen 2, Qwen 3.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class RotaryAttention(nn.Module):
    """Base of attention modules that stand in for a stock one; `maps` says which of its linear maps they keep.

    Args:
        layer_idx: the layer.
        hidden: width of the residual stream.
        heads, kv_heads, head_dim: sizes.
        biases: which of q, k, v and o have a bias, as letters.
        scaling: factor on the logits.
        norm_eps: of the norms on the heads of queries and keys (Qwen 3); None: there are none.
        sliding_window: how many entries a token attends to at most; None: no bound.
        dropout: of the attention weights, in training.
        config: the model's configuration, which says by what attention is computed.
    """

    q_proj: nn.Module  # these for type checkers: a class has those that its maps name
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    maps: ClassVar[str] = "qkvo"
    plain_entries: ClassVar[bool] = True
    """Whether the cache holds keys and values of each KV head, as the stock attention's does."""

    def __init__(
        self,
        layer_idx: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        biases: str,
        scaling: float,
        norm_eps: float | None = None,
        sliding_window: int | None = None,
        dropout: float = 0.0,
        config: Any = None,
    ):
        super().__init__()
        self.layer_idx, self.config, self.is_causal = layer_idx, config, True
        self.hidden, self.heads, self.kv_heads, self.head_dim = hidden, heads, kv_heads, head_dim
        self.biases, self.scaling, self.norm_eps = biases, scaling, norm_eps
        self.sliding_window, self.dropout = sliding_window, dropout
        self.num_key_value_groups = heads // kv_heads
        widths = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "o": hidden}
        for name in self.maps:
            reads = heads * head_dim if name == "o" else hidden
            setattr(self, f"{name}_proj", nn.Linear(reads, widths[name], bias=name in biases))
            if name in "qk" and norm_eps is not None:
                setattr(self, f"{name}_norm", nn.RMSNorm(head_dim, eps=norm_eps))

    @property
    def settings(self) -> dict[str, Any]:
        names = ("layer_idx", "hidden", "heads", "kv_heads", "head_dim", "biases", "scaling")
        return {name: getattr(self, name) for name in (*names, "norm_eps", "sliding_window", "dropout")}

    def heads_of(self, hidden_states: Tensor, name: str) -> Tensor:
        """Queries, keys or values before rotation: (batch, head, token, head_dim)."""
        out = getattr(self, f"{name}_proj")(hidden_states).unflatten(-1, (-1, self.head_dim))
        norm = getattr(self, f"{name}_norm", None)
        return (out if norm is None else norm(out)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        """By whatever the model attends: (batch, token, head, width of a value), and the weights or None."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager_attention_forward
        )
        dropout = self.dropout if self.training else 0.0
        more = {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.sliding_window, **kwargs}
        return interface(self, query, key, value, mask, **more)

    @staticmethod
    def eager_attention_forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention in plain PyTorch, weights and all, as transformers' own models fall back to it."""
        key = key.repeat_interleave(module.num_key_value_groups, dim=1)
        value = value.repeat_interleave(module.num_key_value_groups, dim=1)
        logits = query @ key.transpose(-1, -2) * scaling
        if attention_mask is not None:
            logits = logits + attention_mask
        weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        return (weights @ value).transpose(1, 2).contiguous(), weights


def settings_like(attention: Any, sliding_window: int | None) -> dict[str, Any]:
    """The settings of a `RotaryAttention` that does what a stock attention module does."""
    q, k, dim = attention.q_proj, attention.k_proj, attention.head_dim
    norm = getattr(attention, "q_norm", None)
    return {
        "layer_idx": attention.layer_idx,
        "hidden": q.in_features,
        "heads": q.out_features // dim,
        "kv_heads": k.out_features // dim,
        "head_dim": dim,
        "biases": "".join(name for name in "qkvo" if getattr(attention, f"{name}_proj").bias is not None),
        "scaling": attention.scaling,
        "norm_eps": None if norm is None else getattr(norm, "variance_epsilon", getattr(norm, "eps", None)),
        "sliding_window": sliding_window,
        "dropout": attention.attention_dropout,
    }


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads turned by their positions.

    Args:
        x: (batch, head, token, width): what turns together stands half a width apart.
        cos, sin: (batch or 1, token, width), the same in both halves.
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]
