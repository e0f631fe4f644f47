"""A2SF: heavy hitters, with attention that fades as it ages."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView, Received
from foveate.claims import Claim, Finding, Streams, claim
from foveate.errors import FoveateError
from foveate.methods import Paper, method
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("a2sf")
class A2SF(CachePolicy):
    """Keep the entries that received most attention, where older attention counts for less.

    At every query, what an entry received so far is multiplied by `forget`, and the new attention weight is added:
    S <- forget * S + attention. A plain sum favours old tokens, because more queries have seen them; fading takes
    that advantage away, so that no part of the budget need be reserved for recent tokens. With `forget=1,recent=0.5`
    this is H2O.

    Fields: those of `CachePolicy`, and
        forget: the forgetting factor, alpha in the paper, in (0, 1]; 0.1 as in the scripts released with it.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "a2sf:entries=8,forget=0.3"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> int(out.past_key_values.layers[0].held().max())
        8
    """

    paper: ClassVar[Paper | None] = Paper(
        "A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
        2024,
        "https://arxiv.org/abs/2407.20485",
    )
    claim: ClassVar[str] = "attention that fades with age compares old and new tokens fairly, and beats its plain sum"

    forget: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.forget <= 1:
            raise FoveateError(
                f"a2sf: forget={self.forget} is outside (0, 1]: give what a weight is multiplied by at each token."
            )

    def received(self) -> Received:
        return Received(forget=self.forget)

    def score(self, view: CacheView) -> Tensor:
        assert view.received is not None  # asked for above
        return view.received


@claim("a2sf")
class FadingComparesFairly(Claim):
    statement: ClassVar[str] = (
        "summed attention favours old tokens; with a forgetting factor, tokens that are chosen by attention alone "
        "serve better than H2O's at the same budget (abstract)"
    )
    setting: ClassVar[str] = (
        "a fifth of a window of 1,024; 2,048 tokens in chunks of 32, the 1,844 after the first eviction; the plain "
        "sum is a2sf:forget=1, without a recent window like a2sf itself"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, window=1024, chunk=32, skip=204), of=5)
        full = streams.read("full")
        fading = streams.read("a2sf:keep=0.2")
        summed = streams.read("a2sf:keep=0.2,forget=1")
        h2o = streams.read("h2o:keep=0.2")
        window = streams.read("window:keep=0.2")
        return Finding(
            {
                "perplexity, full cache": full.perplexity,
                "over full: a2sf": fading.over(full),
                "over full: plain sum": summed.over(full),
                "over full: h2o": h2o.over(full),
                "over full: recent tokens only": window.over(full),
            },
            {
                "better than the plain sum": fading.below(summed),
                "better than h2o": fading.below(h2o),
                "better than recent tokens only": fading.below(window),
            },
        )
