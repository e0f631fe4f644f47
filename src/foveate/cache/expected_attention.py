"""Expected attention: what future queries will attend to, if they are like those so far."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.attend import rotate
from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView
from foveate.claims import Claim, Finding, Streams, claim
from foveate.errors import FoveateError
from foveate.methods import Paper, Target, method
from foveate.models.anatomy import anatomy
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("expected-attention")
class ExpectedAttention(CachePolicy):
    """Keep the entries that add most to what future queries read: expected attention times the norm of the value.

    Before they are rotated to their positions, the queries of a head are much like a Gaussian. Its mean m and
    covariance C are kept running, in float32, and counted to the cache: (head, head_dim, head_dim + 1) numbers a
    layer. The rotation is averaged over the next `future` positions and applied to both. Then a key k is expected to
    get exp(k.m / sqrt(d) + k.C.k / 2d) of attention, relative to the other entries; the mean over the query heads of
    a KV head, plus `epsilon`, times the norm of the value is the score (section 3). The queries and entries of sinks
    take no part. Where positions are not rotary, the queries are taken as they are.

    Fields: those of `CachePolicy`, with `sinks=4`, and
        future: positions that the rotation is averaged over.
        epsilon: added to every entry's share of the attention, so that large values stay that few attend to. 0 as in
            the authors' release; their evaluation takes 0.01, beside budgets that adapt to the heads.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "expected-attention:entries=8"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> out.past_key_values.layers[0].positions[0, 0, :4].tolist()
        [0, 1, 2, 3]
    """

    paper: ClassVar[Paper | None] = Paper(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        2025,
        "https://arxiv.org/abs/2510.00636",
    )
    claim: ClassVar[str] = "attention expected of future queries tells better what to keep than attention received"

    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1:
            raise FoveateError(f"expected-attention: future={self.future} looks at no position: give 1 or more.")
        if self.epsilon < 0:
            raise FoveateError(f"expected-attention: epsilon={self.epsilon} is negative: give 0 or more.")

    def applied(self, target: Target) -> AbstractContextManager[None]:
        parts = anatomy(target.model)
        if not parts.rotary_is_static:
            raise FoveateError(
                "expected-attention: queries are turned back from their positions, but the rotary frequencies of this "
                f"{parts.family} model change with the length of the text: use a policy such as tova or snapkv."
            )
        return super().applied(target)

    def observe(self, view: CacheView) -> None:
        """Add the queries of this forward to the mean (batch, head, dim) and the summed squares about it."""
        query = view.query.to(torch.promote_types(view.query.dtype, torch.float32))
        if view.inv_freq is not None:
            query = rotate(query, -view.query_positions[:, None], view.inv_freq)
        counts = view.query_positions >= self.sinks
        counts = (counts if view.valid is None else counts & view.valid)[:, None, :, None]
        count = counts.sum(dim=2).to(query.dtype)
        mean = query.masked_fill(~counts, 0).sum(dim=2) / count.clamp(min=1)
        off = (query - mean[:, :, None]).masked_fill(~counts, 0)
        squares = off.transpose(-1, -2) @ off
        if "mean" in view.state:  # two samples become one
            before, old = view.state["count"], view.state["mean"]
            share, gap = count / (before + count).clamp(min=1), mean - old
            squares = view.state["squares"] + squares
            squares = squares + (before * share)[..., None] * gap[..., None] * gap[:, :, None]
            count, mean = before + count, old + share * gap
        view.state.update(count=count, mean=mean, squares=squares)

    def score(self, view: CacheView) -> Tensor:
        mean = view.state["mean"][..., None]
        covariance = view.state["squares"] / view.state["count"].clamp(min=1)[..., None]
        if view.inv_freq is not None:
            turn = self.turn(view.seen, view.inv_freq.to(mean), mean.shape[2])
            mean, covariance = turn @ mean, turn @ covariance @ turn.transpose(-1, -2)
        kv_heads, dim = view.keys.shape[1], view.keys.shape[-1]
        mean, covariance = (x.unflatten(1, (kv_heads, -1)) for x in (mean, covariance))
        key = view.keys.to(mean.dtype)[:, :, None]
        expected = (key @ mean)[..., 0] / math.sqrt(dim) + ((key @ covariance) * key).sum(-1) / (2 * dim)
        expected = expected.masked_fill((view.positions < self.sinks)[:, :, None], -torch.inf)
        # All in logarithms, where small scores don't vanish and tie.
        share = expected.log_softmax(dim=-1).logsumexp(dim=2) - math.log(expected.shape[2])
        share = torch.logaddexp(share, share.new_tensor(self.epsilon).log())
        return share + view.values.to(mean.dtype).norm(dim=-1).log()

    def turn(self, seen: Tensor, inv_freq: Tensor, dim: int) -> Tensor:
        """The rotation averaged over the next positions, (batch, 1, dim, dim): it turns vectors, and shortens them."""
        angle = (seen + torch.arange(self.future, device=seen.device))[..., None] * inv_freq
        cos, sin = angle.cos().mean(dim=2), angle.sin().mean(dim=2)
        turn = torch.eye(dim, dtype=inv_freq.dtype, device=inv_freq.device).repeat(len(seen), 1, 1, 1)
        i = torch.arange(len(inv_freq), device=inv_freq.device)
        j = i + len(inv_freq)
        turn[..., i, i] = turn[..., j, j] = cos
        turn[..., j, i], turn[..., i, j] = sin, -sin
        return turn


@claim("expected-attention")
class TheFutureIsLikeThePast(Claim):
    statement: ClassVar[str] = (
        "entries chosen by the attention expected of future queries serve consistently better than those chosen by "
        "attention received or by the norms of keys, with little loss at half of the cache (abstract, section 4)"
    )
    setting: ClassVar[str] = (
        "2,048 tokens in pieces of 128; after each, half of a window of 1,024 stays; the 1,536 after the first eviction"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, window=1024, chunk=128, skip=512), of=6)
        full = streams.read("full")
        expected = streams.read("expected-attention:keep=0.5")
        others = {
            "snapkv": streams.read("snapkv:keep=0.5"),
            "tova": streams.read("tova:keep=0.5"),
            "small keys": streams.read("key-norm:keep=0.5"),
            "four sinks and recent tokens": streams.read("window:keep=0.5,sinks=4"),
        }
        return Finding(
            {"perplexity, full cache": full.perplexity, "over full: expected attention": expected.over(full)}
            | {f"over full: {name}": stream.over(full) for name, stream in others.items()},
            {"within 5% of the full cache": expected.over(full).value < 1.05}
            | {f"better than {name}": expected.below(stream) for name, stream in others.items()},
        )
