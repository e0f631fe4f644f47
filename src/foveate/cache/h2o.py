"""H2O: recent entries and heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView, Received
from foveate.cache.random import Random
from foveate.claims import Claim, Finding, Streams, claim
from foveate.methods import Paper, method
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("h2o")
class H2O(CachePolicy):
    """Keep the recent tokens, and of the others those that received most attention so far (Algorithm 1).

    The score of an entry is the attention weight that it received, summed over all queries since it came in and over
    the query heads that share its KV head; at every step the lowest outside the recent window goes.

    Fields: those of `CachePolicy`; `recent=0.5` splits the budget in equal halves, as the paper does.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "h2o:entries=8"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> out.past_key_values.layers[0].positions[0, 0, -4:].tolist()
        [36, 37, 38, 39]
    """

    paper: ClassVar[Paper | None] = Paper(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        2023,
        "https://arxiv.org/abs/2306.14048",
    )
    claim: ClassVar[str] = "a fifth of the entries, recent ones and heavy hitters, nearly keeps the quality"
    recent: float = 0.5

    def received(self) -> Received:
        return Received()

    def score(self, view: CacheView) -> Tensor:
        assert view.received is not None  # asked for above
        return view.received


@dataclass(frozen=True, kw_only=True)
class _LightestFirst(H2O):
    """The opposite, for the claim: heavy hitters are what goes."""

    def score(self, view: CacheView) -> Tensor:
        return -super().score(view)


@claim("h2o")
class HeavyHittersMatter(Claim):
    statement: ClassVar[str] = (
        "a fifth of the cache, recent tokens and heavy hitters, keeps the quality of the full cache; recent tokens "
        "alone don't, and without the heavy hitters quality collapses (abstract, and the experiments that motivate it)"
    )
    setting: ClassVar[str] = (
        "a fifth of a window of 1,024; 2,048 tokens in chunks of 32, the 1,844 after the first eviction; random and "
        "lightest-first keep the same recent half as h2o"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, window=1024, chunk=32, skip=204), of=6)
        full = streams.read("full")
        read = {
            "h2o": streams.read("h2o:keep=0.2"),
            "recent tokens only": streams.read("window:keep=0.2"),
            "four sinks and recent tokens": streams.read("streaming:keep=0.2"),
            "random": streams.read(Random(keep=0.2, recent=0.5)),
            "heavy hitters evicted": streams.read(_LightestFirst(keep=0.2)),
        }
        ratios = {f"over full: {name}": stream.over(full) for name, stream in read.items()}
        return Finding(
            {"perplexity, full cache": full.perplexity} | ratios,
            {
                "within 5% of the full cache": ratios["over full: h2o"].value < 1.05,
                "better than recent tokens only": read["h2o"].below(read["recent tokens only"]),
                "better than random": read["h2o"].below(read["random"]),
                "evicting the heavy hitters is worse than recent tokens only": read["recent tokens only"].below(
                    read["heavy hitters evicted"]
                ),
                "and worse than random": read["random"].below(read["heavy hitters evicted"]),
            },
        )
