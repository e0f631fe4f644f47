"""Multi-head latent attention: what is cached is a latent, and every head reads its own keys and values out of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .rotary import RotaryAttention, rotated


class LatentAttention(RotaryAttention):
    """Attention whose cache holds one latent for keys and one for values, for all heads together.

    Keys: `k_down` makes a latent of `k_rank` complex numbers a token; number c turns with the rotary frequency
    `frequency[c]`, and is cached turned. Head h's key at frequency f is the sum of `k_up[h, c]` times number c over
    all c of that frequency. Such an up-projection commutes with the rotation: so positions are settled before the
    cache, and the up-projection can be moved onto the query, so that no key is ever written out.

    Values: `v_down` makes a latent of `v_rank` numbers; `v_up[h]` makes head h's values of it, after the attention.

    Args:
        k_rank, v_rank: as above; full where 2 * k_rank = v_rank = kv_heads * head_dim.
        config, **settings: as in `RotaryAttention`. Where keys are normed (`norm_eps`), `k_rank` must be full.
    """

    maps: ClassVar[str] = "qo"
    plain_entries: ClassVar[bool] = False
    frequency: Tensor

    def __init__(self, k_rank: int, v_rank: int, config: Any = None, **settings: Any):
        super().__init__(config=config, **settings)
        self.k_rank, self.v_rank = k_rank, v_rank
        self.num_key_value_groups = self.heads  # all heads read the same latent
        self.k_down = nn.Linear(self.hidden, 2 * k_rank, bias="k" in self.biases)
        self.v_down = nn.Linear(self.hidden, v_rank, bias="v" in self.biases)
        self.k_up = nn.Parameter(torch.empty(self.heads, 2, k_rank))  # real and imaginary parts
        self.v_up = nn.Parameter(torch.empty(self.heads, self.head_dim, v_rank))
        if self.norm_eps is not None:
            self.k_norm = nn.RMSNorm(self.head_dim, eps=self.norm_eps)
        self.register_buffer("frequency", torch.empty(k_rank, dtype=torch.int64))

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "k_rank": self.k_rank, "v_rank": self.v_rank}

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,  # what transformers calls it from 5.24 on
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        half = self.head_dim // 2
        both = torch.cat([self.frequency, self.frequency + half])  # of each number, its two places in a head
        cos, sin = position_embeddings
        key = rotated(self._k_latent(hidden_states), cos[..., both], sin[..., both])
        value = self.v_down(hidden_states)[:, None]
        if (cache := past_key_values if cache is None else cache) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        query = rotated(self.heads_of(hidden_states, "q"), cos, sin)
        # Re(conj(q) u z) = Re(conj(conj(u) q) z): the up-projection u moves from the latent z to the query q.
        a, b = query[..., both].chunk(2, dim=-1)
        real, imaginary = self.k_up[:, None, 0], self.k_up[:, None, 1]
        query = torch.cat([a * real + b * imaginary, b * real - a * imaginary], dim=-1)
        out, weights = self.attend(query, key, value, attention_mask, **kwargs)
        out = torch.einsum("bnhr,hdr->bnhd", out, self.v_up)
        return self.o_proj(out.flatten(-2)), weights

    def _k_latent(self, hidden_states: Tensor) -> Tensor:
        """(batch, 1, token, 2 * k_rank): real parts, then imaginary parts."""
        latent = self.k_down(hidden_states)[:, None]
        if self.norm_eps is None:
            return latent
        shape = (2, self.kv_heads, self.head_dim // 2)
        heads = latent.unflatten(-1, shape).transpose(-3, -2).flatten(-2)  # (..., kv_head, head_dim)
        return self.k_norm(heads).unflatten(-1, (2, -1)).transpose(-3, -2).flatten(-3)
