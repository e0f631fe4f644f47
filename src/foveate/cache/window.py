"""Window attention: only the most recent entries stay."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView
from foveate.claims import Claim, Finding, Streams, claim
from foveate.methods import Paper, method
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("window")
class Window(CachePolicy):
    """Keep the most recent entries and nothing else; with `sinks=4`, StreamingLLM but for the positions.

    Fields: those of `CachePolicy`.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "window:entries=8"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> out.past_key_values.layers[0].positions[0, 0].tolist()
        [32, 33, 34, 35, 36, 37, 38, 39]
    """

    paper: ClassVar[Paper | None] = Paper(
        "Longformer: The Long-Document Transformer", 2020, "https://arxiv.org/abs/2004.05150"
    )
    claim: ClassVar[str] = "memory stays constant, but perplexity breaks as soon as the first tokens are evicted"

    def score(self, view: CacheView) -> Tensor:
        return view.positions.float()


@claim("window")
class BreaksAtTheFirstEviction(Claim):
    statement: ClassVar[str] = (
        "window attention is as good as full attention until the first token is evicted, and breaks right then "
        "(Efficient Streaming Language Models with Attention Sinks, 2023, figure 3)"
    )
    setting: ClassVar[str] = "512 entries; 1,536 tokens in chunks of 32, the 512 that fit and the 1,024 that follow"

    def run(self, bench: Bench) -> Finding:
        fits = Streams(bench, Perplexity(tokens=512, chunk=32), of=4)
        before = fits.read("window:entries=512").over(fits.read("full"))
        beyond = Streams(bench, Perplexity(tokens=1536, chunk=32, skip=512), of=4)
        after = beyond.read("window:entries=512").over(beyond.read("full"))
        return Finding(
            {"perplexity over full, before the first eviction": before, "perplexity over full, after": after},
            {
                "no loss before (under 0.1%)": abs(before.value - 1) < 1e-3,
                "broken after (over 1.2 times, interval included)": after.low > 1.2,
            },
        )
