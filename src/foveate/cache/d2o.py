"""D2O: budgets by the density of a layer's attention, and evicted entries merged into similar ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.attend import BLOCK
from foveate.cache.budgets.base import Budget
from foveate.cache.budgets.density import Density
from foveate.cache.entries import CacheView
from foveate.cache.h2o import H2O
from foveate.claims import Claim, Finding, Streams, claim
from foveate.errors import FoveateError
from foveate.methods import Paper, Recipe, method
from foveate.tasks.base import Bench
from foveate.tasks.passkey import Passkey
from foveate.tasks.perplexity import Perplexity

TIE = 1e-5
"""Cosines that differ by less are equal: rounding is not to decide who is merged."""


@method("d2o")
class D2O(H2O):
    """Score as `h2o`, give layers of dense attention more, and merge what goes into the nearest of what stays.

    When entries go, each looks for the kept entry whose key has the highest cosine with its own, u. The threshold
    follows the mean of these u: the first time it is that mean, then

        threshold = ema * mean(u) + (1 - ema) * threshold

    An entry whose u reaches the threshold is merged, the others are dropped. A kept entry c becomes the mean of itself
    and of those merged into it, keys and values alike, with weights exp(u_i) for these and exp(1) for itself:

        k_c = (e k_c + sum_i exp(u_i) k_i) / (e + sum_i exp(u_i))

    Sinks take no part. Thresholds are each KV head's own, and of each sequence; in the authors' code, one threshold and
    one decision serve all heads of a layer.

    Fields: those of `CachePolicy`, with `sinks=4` and `recent=0.5`, as the authors run it, and `budget=density`.
        merging: whether evicted entries are merged; False drops them all.
        ema: how much the threshold follows the entries that go now, the paper's beta, 0 to 1.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "d2o:keep=0.3"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> sorted(out.past_key_values.layers[0].state)
        ['threshold']
    """

    paper: ClassVar[Paper | None] = Paper(
        "D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large Language Models",
        2024,
        "https://arxiv.org/abs/2406.13035",
    )
    claim: ClassVar[str] = "merging similar entries and sparing layers of dense attention keeps more than eviction does"
    merges: ClassVar[bool] = True

    sinks: int = 4
    budget: Budget = Density()
    merging: bool = True
    ema: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema <= 1:
            raise FoveateError(f"d2o: ema={self.ema} is outside [0, 1]: give how much the threshold follows.")

    def merge(self, kept: CacheView, gone: CacheView) -> tuple[Tensor, Tensor] | None:
        if not self.merging:
            return None
        # `gone` has a slot for every entry there was; in decoding only one went. Move those that went to the front.
        went = gone.positions >= self.sinks
        most = int(went.sum(-1).max())
        if most == 0:
            return None
        went, order = went.sort(dim=-1, descending=True, stable=True)
        went, index = went[..., :most], order[..., :most, None]
        exact = torch.promote_types(kept.keys.dtype, torch.float32)
        keys, values = (x.gather(2, index.expand(-1, -1, -1, x.shape[-1])).to(exact) for x in (gone.keys, gone.values))
        u, into = nearest(keys, kept.keys.to(exact), kept.positions >= self.sinks)
        went = went & u.isfinite()  # nothing that may be merged into was kept
        threshold = self.threshold(kept.state, u.masked_fill(~went, 0), went)
        weight = u.exp() * (went & (u >= threshold - TIE))

        received = torch.zeros_like(kept.positions, dtype=exact).scatter_add(-1, into, weight)[..., None]

        def merged(old: Tensor, new: Tensor) -> Tensor:
            wide = into[..., None].expand_as(new)
            total = torch.scatter_add(math.e * old.to(exact), 2, wide, weight[..., None] * new)
            return torch.where(received > 0, (total / (math.e + received)).to(old.dtype), old)

        return merged(kept.keys, keys), merged(kept.values, values)

    def threshold(self, state: dict[str, Tensor], u: Tensor, went: Tensor) -> Tensor:
        """Bring the threshold up to date: (batch, kv_head, 1).

        Args:
            state: what the layer keeps; "threshold", (batch, kv_head), is NaN where nothing went yet.
            u: (batch, kv_head, entry): each entry's cosine with the nearest kept one, 0 where none went.
            went: (batch, kv_head, entry), bool.
        """
        count = went.sum(-1)
        mean = u.sum(-1) / count.clamp(min=1)
        before = state["threshold"] if "threshold" in state else torch.full_like(mean, torch.nan)
        after = torch.where(before.isnan(), mean, self.ema * mean + (1 - self.ema) * before)
        state["threshold"] = torch.where(count > 0, after, before)
        return state["threshold"][..., None]


def nearest(keys: Tensor, others: Tensor, may: Tensor) -> tuple[Tensor, Tensor]:
    """For each key, the highest cosine with one of the others, and which: (batch, kv_head, key), float and int64.

    Args:
        keys: (batch, kv_head, key, head_dim).
        others: (batch, kv_head, other, head_dim).
        may: (batch, kv_head, other), bool: others that count; where there is none, the cosine is -inf.
    """
    normalize = torch.nn.functional.normalize
    turned = normalize(others, dim=-1).transpose(-1, -2)
    step = max(1, BLOCK // may.numel())  # keys whose cosines are held at a time
    best = [
        (normalize(some, dim=-1) @ turned).masked_fill(~may[:, :, None], -torch.inf).max(dim=-1)
        for some in keys.split(step, dim=2)
    ]
    return torch.cat([b.values for b in best], dim=-1), torch.cat([b.indices for b in best], dim=-1)


@claim("d2o")
class MergingAndDensityHelp(Claim):
    statement: ClassVar[str] = (
        "at an equal total, merging what is evicted and giving more to layers of dense attention keeps language "
        "modelling and retrieval better than h2o and than the same budget for all layers; each of the two adds to it "
        "(abstract, and the ablations)"
    )
    setting: ClassVar[str] = (
        "a fifth of a window of 1,024; 2,048 tokens in chunks of 32, the 1,844 after the first eviction; 8 pass keys "
        "in 1,024 tokens each, at a fifth; h2o with the same four sinks"
    )

    def run(self, bench: Bench) -> Finding:
        recipes = {
            "d2o": "d2o:keep=0.2",
            "d2o, uniform budget": "d2o:keep=0.2,budget=uniform",
            "d2o, no merging": "d2o:keep=0.2,merging=false",
            "h2o": "h2o:keep=0.2,sinks=4",
        }
        streams = Streams(bench, Perplexity(tokens=2048, window=1024, chunk=32, skip=204), of=8)
        full = streams.read("full")
        read = {name: streams.read(recipe) for name, recipe in recipes.items()}
        quiet = replace(bench, progress=lambda part: None)
        found = {}
        for name in ("d2o", "d2o, uniform budget", "h2o"):
            found[name] = Passkey().measure(quiet, Recipe.of(recipes[name])).metrics["passkey"]
            bench.progress((5 + len(found)) / 8)
        return Finding(
            {"perplexity, full cache": full.perplexity}
            | {f"over full: {name}": stream.over(full) for name, stream in read.items()}
            | {f"d2o over {name}": read["d2o"].over(stream) for name, stream in read.items() if name != "d2o"}
            | {f"pass keys found: {name}": metric for name, metric in found.items()},
            {
                "better than h2o": read["d2o"].below(read["h2o"]),
                "better than with a uniform budget": read["d2o"].below(read["d2o, uniform budget"]),
                "better than without merging": read["d2o"].below(read["d2o, no merging"]),
                "finds no fewer pass keys than h2o": found["d2o"].value >= found["h2o"].value,
                "and no fewer than with a uniform budget": found["d2o"].value >= found["d2o, uniform budget"].value,
            },
        )
