"""Key norm: the entries with small keys stay."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView
from foveate.claims import Claim, Finding, Streams, claim
from foveate.methods import Paper, method
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("key-norm")
class KeyNorm(CachePolicy):
    """Keep the entries whose keys have the smallest norm.

    Small keys tend to receive much attention, so their norm can stand in for it, and no attention has to be watched.

    Fields: those of `CachePolicy`.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "key-norm:entries=8"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> int(out.past_key_values.layers[0].held().max())
        8
    """

    paper: ClassVar[Paper | None] = Paper(
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        2024,
        "https://arxiv.org/abs/2406.11430",
    )
    claim: ClassVar[str] = "half of the entries, those with small keys, keep the quality of all"

    def score(self, view: CacheView) -> Tensor:
        # In the first layer, equal tokens have equal norms: of those, the latest stay. It is a tilt of a ten-thousandth
        # over the whole text, however long that is, so that it decides between near ties only.
        age = (view.seen - view.positions) / view.seen
        return -view.keys.float().norm(dim=-1) * (1 + 1e-4 * age)


@claim("key-norm")
class SmallKeysMatter(Claim):
    statement: ClassVar[str] = "half of the cache, the large keys, can go without loss on language modelling (abstract)"
    setting: ClassVar[str] = "512 entries; 1,024 tokens in chunks of 32, the 512 after the first eviction"

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=1024, chunk=32, skip=512), of=3)
        full = streams.read("full")
        small = streams.read("key-norm:entries=512")
        lost, gained = small.over(full), small.over(streams.read("random:entries=512"))
        return Finding(
            {"perplexity, full cache": full.perplexity, "small keys over full": lost, "small keys over random": gained},
            {"within 5% of the full cache": lost.value < 1.05, "better than random": gained.high < 1},
        )
