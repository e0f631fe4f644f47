"""SnapKV: what the end of the prompt attends to."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView, Received
from foveate.claims import Claim, Finding, Streams, claim
from foveate.errors import FoveateError
from foveate.methods import Paper, method
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("snapkv")
class SnapKV(CachePolicy):
    """Keep the last `window` tokens, and of those before the ones that they attend to, with their neighbours.

    The score of an entry before the window is the attention weight that it receives from the window's queries, summed
    over these and the query heads of its KV head; then the largest (or the mean) among `kernel` neighbouring entries,
    so that what is kept comes in runs (section 4). Entries with the same score go by what they received themselves.

    The paper evicts once, after the prompt. Here the budget holds while tokens are generated, too: the window moves on
    with them, and what it observed fades by 1/`window` with each.

    Fields: those of `CachePolicy`, and
        window: queries that are observed, and recent tokens that always stay; in a budget of fewer entries, the most
            recent of them.
        kernel: neighbouring entries pooled, odd; 1 = none. As `window`, the paper's setting on LongBench.
        pooling: "max" or "mean".

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "snapkv:entries=9,window=4,kernel=3"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> out.past_key_values.layers[0].positions[0, 0, -4:].tolist()
        [36, 37, 38, 39]
    """

    paper: ClassVar[Paper | None] = Paper(
        "SnapKV: LLM Knows What You are Looking for Before Generation", 2024, "https://arxiv.org/abs/2404.14469"
    )
    claim: ClassVar[str] = "the end of a prompt already attends to what the continuation will need"

    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise FoveateError(f"snapkv: window={self.window} observes nothing: give 1 or more.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise FoveateError(f"snapkv: kernel={self.kernel} has no middle: give an odd number, or 1 not to pool.")
        if self.pooling not in ("max", "mean"):
            raise FoveateError(f"snapkv: pooling={self.pooling} is not one of max, mean.")

    def received(self) -> Received:
        return Received(last=self.window)

    def score(self, view: CacheView) -> Tensor:
        assert view.received is not None  # asked for above
        observing = view.positions >= view.seen - self.window
        received = view.received.masked_fill(observing | (view.positions < 0), 0)
        pool = max_pool1d if self.pooling == "max" else avg_pool1d
        pooled = pool(received, self.kernel, stride=1, padding=self.kernel // 2)
        # Sorted by what was pooled, then by the entry's own, then by place: pooling makes many scores equal.
        order = received.argsort(dim=-1, stable=True)
        order = order.gather(-1, pooled.gather(-1, order).argsort(dim=-1, stable=True))
        place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, place)
        return torch.where(observing, rank.shape[-1] + view.positions, rank).float()


@claim("snapkv")
class ThePromptsEndKnows(Claim):
    statement: ClassVar[str] = (
        "what the last tokens of a prompt attend to is what the continuation will need: a prompt compressed by it "
        "serves about as well as the whole, and better than one compressed by H2O (abstract, section 5)"
    )
    setting: ClassVar[str] = (
        "2,048 tokens in pieces of 128; after each, a quarter of a window of 1,024 stays; the 1,792 after the first "
        "eviction; random keeps the same recent window"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, window=1024, chunk=128, skip=256), of=5)
        full = streams.read("full")
        snap = streams.read("snapkv:keep=0.25")
        others = {
            "four sinks and recent tokens": streams.read("window:keep=0.25,sinks=4"),
            "h2o": streams.read("h2o:keep=0.25"),
            "random": streams.read("random:keep=0.25,recent=0.125"),
        }
        return Finding(
            {"perplexity, full cache": full.perplexity, "over full: snapkv": snap.over(full)}
            | {f"over full: {name}": stream.over(full) for name, stream in others.items()},
            {"within 5% of the full cache": snap.over(full).value < 1.05}
            | {f"better than {name}": snap.below(stream) for name, stream in others.items()},
        )
