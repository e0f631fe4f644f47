"""Attention of linear time whose state has a constant size: a recurrence over all that is past, and a sliding window.

This file travels with saved models: torch and transformers are all it needs.

Sizes in the shapes below: `group` is the query heads of a KV head, `feature` the rows of the recurrent memory.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

SEGMENT = 4096
"""Tokens that go through a layer at once; longer texts go in pieces, so that memory is bounded."""
CHUNK, GATED_CHUNK = 64, 16
"""Tokens within which the recurrence is computed in parallel; a gate for each channel makes a chunk dearer."""

# ---- the two sums ---------------------------------------------------------------------------------------------------


def windowed(q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, window: int) -> Tensor:
    """Softmax attention over a sliding window, before it is divided: query i sees the entries i + 1 to i + window.

    Args:
        q: (batch, kv_head, group, n, head_dim).
        keys, values: (batch, kv_head, window + n, head_dim): `window` entries from before, then the queries' own.
        valid: bool (batch, window + n): False where an entry is padding.
        window: entries that a query sees, its own included.

    Returns:
        (batch, kv_head, group, n, head_dim + 1): sum of exp(s - max s) v, and in the last column sum of exp(s - max s);
        zeros where a query sees nothing. float32 at least.
    """
    n, scale = q.shape[3], q.shape[-1] ** -0.5
    block = min(n, max(CHUNK, min(window, 256)))
    pad, span = -n % block, window + block
    # Block by block: (batch, kv_head, blocks, group, block, head_dim) against spans of entries that overlap.
    q = functional.pad(q, (0, 0, 0, pad)).unflatten(3, (-1, block)).transpose(2, 3)
    keys, values = (functional.pad(x, (0, 0, 0, pad)).unfold(2, span, block) for x in (keys, values))
    there = functional.pad(valid, (0, pad)).unfold(1, span, block)
    i, j = torch.arange(block, device=q.device)[:, None], torch.arange(span, device=q.device)
    seen = ((j > i) & (j <= i + window)) & there[:, None, :, None, None, :]
    scores = (q.flatten(3, 4) @ keys).unflatten(3, (-1, block)) * scale
    scores = scores.to(_exact(scores)).masked_fill(~seen, torch.finfo(torch.float32).min)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * seen
    sums = (weights.flatten(3, 4).to(values.dtype) @ values.mT).unflatten(3, (-1, block)).to(weights.dtype)
    out = torch.cat([sums, weights.sum(-1, keepdim=True)], -1)
    return out.transpose(2, 3).flatten(3, 4)[:, :, :, :n]


def recurrent(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence S_t = diag(exp(log_gate_t)) S_(t-1) + k_t v_t', y_t = q_t S_t, in time n x chunk.

    Args:
        q: (batch, kv_head, group, n, feature).
        k: (batch, kv_head, n, feature).
        v: (batch, kv_head, n, columns).
        log_gate: as `k`, at most 0; None: nothing is forgotten.
        memory: S before the first token, (batch, kv_head, feature, columns).

    Returns:
        y, (batch, kv_head, group, n, columns), and S after the last token.
    """
    n = k.shape[2]
    if n == 1:  # a step of decoding
        if log_gate is not None:
            memory = memory * log_gate.exp().mT
        memory = memory + k.mT @ v
        return (q.squeeze(3) @ memory).unsqueeze(3), memory
    chunk = min(n, CHUNK if log_gate is None else GATED_CHUNK)
    pad = -n % chunk  # zeros: keys that add nothing, and gates that forget nothing
    q = functional.pad(q, (0, 0, 0, pad)).unflatten(3, (-1, chunk)).transpose(2, 3)  # .. chunks, group, chunk, feature
    k, v = (functional.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, chunk)) for x in (k, v))  # .. chunks, chunk, feature
    if log_gate is None:
        near = (q.flatten(3, 4) @ k.mT).unflatten(3, (-1, chunk)).tril()
        states = torch.cat([memory.unsqueeze(2), k.mT @ v], 2).cumsum(2)
        before, memory = states[:, :, :-1], states[:, :, -1].clone()  # or all states would be kept with it
    else:
        # Decay from j to i is exp(fall_i - fall_j). Only differences are exponentiated, which are never above 0: the
        # two factors alone would overflow.
        fall = functional.pad(log_gate, (0, 0, 0, pad)).unflatten(2, (-1, chunk)).cumsum(3)
        ahead = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1).unsqueeze(-1)
        decay = (fall.unsqueeze(4) - fall.unsqueeze(3)).masked_fill(ahead, -torch.inf).exp()  # .. i, j, feature
        near = (q.transpose(3, 4) @ (k.unsqueeze(3) * decay).mT).transpose(3, 4)
        added = (k * (fall[..., -1:, :] - fall).exp()).mT @ v
        kept = fall[..., -1, :, None].exp()
        steps = []
        for step in range(k.shape[2]):
            steps.append(memory)
            memory = kept[:, :, step] * memory + added[:, :, step]
        before = torch.stack(steps, 2)
        q = q * fall.exp().unsqueeze(3)
    y = (near.flatten(3, 4) @ v + q.flatten(3, 4) @ before).unflatten(3, (-1, chunk))
    return y.transpose(2, 3).flatten(3, 4)[:, :, :, :n], memory


def _exact(like: Tensor) -> torch.dtype:
    """The dtype of sums: float32, or float64 where that is what a model runs in."""
    return torch.promote_types(like.dtype, torch.float32)


# ---- the state ------------------------------------------------------------------------------------------------------


class Past(NamedTuple):
    """All that a layer keeps of a text.

    Attributes:
        keys, values: (batch, kv_head, window, head_dim): the last `window` entries, keys rotated.
        valid: bool (batch, window): False where there is none yet, or padding.
        memory: (batch, kv_head, feature, columns), float32.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    memory: Tensor


class PastLayer(CacheLayerMixin):
    """A layer's place in transformers' cache that holds a `Past`; its size does not grow.

    To the masks it says what the layer that it replaced would have said, so that the masks of the model's other layers
    stay right whichever layer they are read off.
    """

    def __init__(self, sliding_window: int | None = None):
        super().__init__()
        self.sliding_window, self.is_sliding = sliding_window, sliding_window is not None
        self.valid: Tensor | None = None
        self.memory: Tensor | None = None
        self.seen = 0

    @property
    def past(self) -> Past | None:
        held: Any = (self.keys, self.values, self.valid, self.memory)
        return None if self.memory is None else Past(*held)

    def keep(self, past: Past, tokens: int) -> None:
        """Hold what is past now that `tokens` more went by."""
        self.keys, self.values, self.valid, self.memory = past
        self.seen += tokens
        self.is_initialized = True

    def _each(self, change: Any) -> None:
        if self.memory is not None:
            self.keys, self.values, self.valid, self.memory = (change(x) for x in self.past)  # type: ignore[union-attr]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        self.keys = self.values = self.valid = self.memory = None
        self.seen, self.is_initialized = 0, False

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else len(query_length)  # some versions give positions
        held = self.seen if self.sliding_window is None else min(self.seen, self.sliding_window - 1)
        return held + new, self.seen - held

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in other versions

    def lazy_initialization(self, *args: Any) -> None:
        pass  # what is held depends on the attention module, which makes it at the first forward

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("this layer keeps a state of constant size, and no keys and values can be added to it.")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a layer of linear attention can't forget its last tokens: use no assisted decoding.")

    def offload(self) -> None:
        pass  # small, so it stays where it is

    def prefetch(self) -> None:
        pass


# ---- the attention --------------------------------------------------------------------------------------------------


class LinearAttention(nn.Module):
    """Base of what stands in for a softmax attention with rotary positions. A technique writes `mixed` and `rows`.

    Text may come whole, in pieces of any size or token by token, with the same numbers; padding is read off the
    attention mask (a token that may not see itself is padding). Several texts packed into one row are not told apart.

    Args:
        layer_idx: the layer.
        hidden, heads, kv_heads, head_dim: sizes.
        window: tokens that softmax attention sees, its own included; 0: none.
        biases: which of "q", "k", "v", "o" have a bias.
        norm_eps: of the norms of queries and keys, where the model has them (Qwen 3).
    """

    plain_entries: ClassVar[bool] = False  # there are no entries that a cache policy could choose from

    def __init__(
        self,
        layer_idx: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        biases: str = "",
        norm_eps: float | None = None,
    ):
        super().__init__()
        self.layer_idx, self.hidden, self.heads, self.kv_heads = layer_idx, hidden, heads, kv_heads
        self.head_dim, self.window, self.biases, self.norm_eps = head_dim, window, biases, norm_eps
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias="q" in biases)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias="k" in biases)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias="v" in biases)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias="o" in biases)
        if norm_eps is not None:
            self.q_norm, self.k_norm = (Qwen3RMSNorm(head_dim, eps=norm_eps) for _ in range(2))

    @property
    def settings(self) -> dict[str, Any]:
        names = ("layer_idx", "hidden", "heads", "kv_heads", "head_dim", "window", "biases", "norm_eps")
        return {name: getattr(self, name) for name in names}

    @property
    def rows(self) -> tuple[int, int]:
        """Rows and columns of the memory of a KV head."""
        raise NotImplementedError

    def mixed(
        self, q: Tensor, k: Tensor, v: Tensor, turned: tuple[Tensor, Tensor], valid: Tensor, past: Past
    ) -> tuple[Tensor, Past]:
        """What the heads answer, and what is past then.

        Args:
            q: (batch, kv_head, group, n, head_dim). k, v: (batch, kv_head, n, head_dim).
            turned: q and k after rotation.
            valid: bool (batch, n).
            past: before these tokens.

        Returns:
            (batch, kv_head, group, n, head_dim), float32 at least.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        cache: Any = None,  # what transformers calls it from 5.24 on
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        batch, n, _ = hidden_states.shape
        cache = past_key_values if cache is None else cache
        place = None if cache is None else self._place(cache)
        valid = valid_tokens(attention_mask, batch, n, hidden_states.device)
        before = None if place is None else place.past
        out, past = self.attended(*self.projected(hidden_states, position_embeddings), valid, before)
        if place is not None:
            place.keep(past, n)
        return self.o_proj(out), None

    def projected(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Queries, keys and values of hidden states (batch, n, hidden), and queries and keys rotated: see `mixed`."""
        maps = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (each(hidden_states).unflatten(-1, (-1, self.head_dim)) for each in maps)
        if self.norm_eps is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        turned_q, turned_k = apply_rotary_pos_emb(q, k, *position_embeddings)
        q, turned_q = (x.unflatten(1, (self.kv_heads, -1)) for x in (q, turned_q))
        return q, k, v, (turned_q, turned_k)

    def attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        turned: tuple[Tensor, Tensor],
        valid: Tensor | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Past]:
        """What goes into the output projection, (batch, n, heads x head_dim), and what is past then: see `mixed`."""
        n = k.shape[2]
        if valid is None:
            valid = torch.ones(len(k), n, dtype=torch.bool, device=k.device)
        if past is None:
            past = self._nothing(k)
        parts = []
        for piece in (slice(at, at + SEGMENT) for at in range(0, n, SEGMENT)):
            q_here, k_here, v_here, turned_q, turned_k = (x[..., piece, :] for x in (q, k, v, *turned))
            part, past = self.mixed(q_here, k_here, v_here, (turned_q, turned_k), valid[:, piece], past)
            parts.append(part.to(v.dtype))
        return torch.cat(parts, 3).permute(0, 3, 1, 2, 4).flatten(2), past

    def _nothing(self, like: Tensor) -> Past:
        batch, heads = like.shape[:2]
        empty = like.new_zeros(batch, heads, self.window, self.head_dim)
        valid = torch.zeros(batch, self.window, dtype=torch.bool, device=like.device)
        return Past(empty, empty.clone(), valid, like.new_zeros(batch, heads, *self.rows, dtype=_exact(like)))

    def _joined(self, past: Past, keys: Tensor, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of the window and those that come: (batch, kv_head, window + n, head_dim) twice, and valid."""
        entries = (torch.cat([old, new], 2) for old, new in ((past.keys, keys), (past.values, values)))
        return *entries, torch.cat([past.valid, valid], 1)  # type: ignore[return-value]

    def _last(self, keys: Tensor, values: Tensor, valid: Tensor, memory: Tensor) -> Past:
        """What is past after the last of these entries; copies, so that nothing else is kept alive."""
        at = keys.shape[2] - self.window
        return Past(keys[:, :, at:].clone(), values[:, :, at:].clone(), valid[:, at:].clone(), memory)

    def _place(self, cache: Any) -> PastLayer:
        layers = cache.layers
        while len(layers) <= self.layer_idx and getattr(cache, "layer_class_to_replicate", None) is not None:
            layers.append(cache.layer_class_to_replicate())
        there = layers[self.layer_idx]
        if not isinstance(there, PastLayer):
            if not isinstance(there, DynamicLayer) or there.get_seq_length() > 0:
                raise ValueError(
                    f"layer {self.layer_idx} is linear attention, whose state a {type(cache).__name__} that holds a "
                    f"{type(there).__name__} for it can't keep: begin with an empty DynamicCache."
                )
            there = layers[self.layer_idx] = PastLayer(getattr(there, "sliding_window", None))
        return there


def valid_tokens(mask: Any, batch: int, n: int, device: torch.device) -> Tensor:
    """Which of the last n tokens are no padding, bool (batch, n): those that may see themselves.

    Args:
        mask: as attention gets it: None, (batch, entries), or (batch, 1, n, entries), bool or added to scores.
    """
    if mask is None:
        return torch.ones(batch, n, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"linear attention can't read a mask of the type {type(mask).__name__}: load the model with "
            "attn_implementation='sdpa'."
        )
    own = mask[:, -n:] if mask.ndim == 2 else mask[:, 0].diagonal(mask.shape[-1] - n, -2, -1)
    valid = own > -1 if own.is_floating_point() else own.bool()
    return valid.expand(batch, -1)


class LolcatsAttention(LinearAttention):
    """Softmax attention over the last `window` tokens, linear attention over all before, under one denominator.

    For query n, with c the largest score in its window and g = sigmoid(mix) of its head:
    numerator = g sum_window exp(s_ni - c) v_i + phi_q(q_n) . sum_before phi_k(k_i) v_i; the denominator has 1 for v.
    phi(x) = [softmax(W x), softmax(-W x)], of rotated queries and keys. Queries have a W for each head, keys for each
    KV head.

    Args:
        feature: rows of W. Others: see `LinearAttention`.

    Parameters: `map_q` (heads, head_dim, feature), `map_k` (kv_heads, head_dim, feature), `mix` (heads,).
    """

    def __init__(self, *args: Any, feature: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.feature = feature
        self.map_q = nn.Parameter(torch.empty(self.heads, self.head_dim, feature))
        self.map_k = nn.Parameter(torch.empty(self.kv_heads, self.head_dim, feature))
        self.mix = nn.Parameter(torch.empty(self.heads))

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "feature": self.feature}

    @property
    def rows(self) -> tuple[int, int]:
        return 2 * self.feature, self.head_dim + 1  # the last column is the denominator

    def mixed(
        self, q: Tensor, k: Tensor, v: Tensor, turned: tuple[Tensor, Tensor], valid: Tensor, past: Past
    ) -> tuple[Tensor, Past]:
        n, exact = q.shape[3], _exact(q)
        q, k = turned
        keys, values, there = self._joined(past, k, v, valid)
        # As a token comes in, the oldest of the window goes over into the memory.
        leaves = phi(keys[:, :, :n].to(exact), self.map_k) * there[:, None, :n, None]
        v = functional.pad(values[:, :, :n].to(exact), (0, 1), value=1.0)
        asks = phi(q.flatten(1, 2).to(exact), self.map_q).unflatten(1, (self.kv_heads, -1))
        total, memory = recurrent(asks, leaves, v, None, past.memory)
        if self.window:
            share = self.mix.to(exact).sigmoid().view(self.kv_heads, -1, 1, 1)
            total = total + share * windowed(q, keys, values, there, self.window)
        out = total[..., :-1] / total[..., -1:].clamp_min(torch.finfo(torch.float32).tiny)
        return out, self._last(keys, values, there, memory)


def phi(x: Tensor, weight: Tensor) -> Tensor:
    """Features of x (batch, heads, n, head_dim) under (heads, head_dim, feature): (batch, heads, n, 2 feature)."""
    y = x @ weight.to(x.dtype)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


class LigerAttention(LinearAttention):
    """Half a gated recurrence over all tokens, half softmax attention over the last `window`; no new parameters.

    The recurrence has features softmax(q) and softmax(k), and gates sigmoid(k) ^ (1 / 16), of queries and keys that are
    not rotated. With window=0 the recurrence stands alone.

    Args:
        pool: neighbouring channels of a key that share a gate, their mean.
        gated: whether the recurrence forgets.
        Others: see `LinearAttention`.
    """

    def __init__(self, *args: Any, pool: int = 1, gated: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pool, self.gated = pool, gated

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "pool": self.pool, "gated": self.gated}

    @property
    def rows(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim

    def mixed(
        self, q: Tensor, k: Tensor, v: Tensor, turned: tuple[Tensor, Tensor], valid: Tensor, past: Past
    ) -> tuple[Tensor, Past]:
        exact, there = _exact(q), valid[:, None, :, None]
        gate = None
        if self.gated:
            pooled = k.to(exact).unflatten(-1, (-1, self.pool)).mean(-1).repeat_interleave(self.pool, -1)
            gate = functional.logsigmoid(pooled) / 16 * there
        asks, adds = q.to(exact).softmax(-1), k.to(exact).softmax(-1) * there
        out, memory = recurrent(asks, adds, v.to(exact), gate, past.memory)
        keys, values, valid = self._joined(past, turned[1], v, valid)
        if self.window:
            near = windowed(turned[0], keys, values, valid, self.window)
            out = 0.5 * out + 0.5 * near[..., :-1] / near[..., -1:].clamp_min(torch.finfo(torch.float32).tiny)
        return out, self._last(keys, values, valid, memory)
