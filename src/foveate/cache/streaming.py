"""StreamingLLM: attention sinks and a window, at positions inside the cache."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView
from foveate.claims import Claim, Finding, Stream, Streams, claim
from foveate.data.text import tokens
from foveate.methods import Paper, method
from foveate.tasks.base import Bench, surprisal
from foveate.tasks.perplexity import Perplexity


@method("streaming")
class Streaming(CachePolicy):
    """Keep the first `sinks` tokens and the most recent ones; number them by their place in the cache.

    Section 3.2 of the paper: keys are held as they are and rotated anew whenever they are attended to, so that the
    model never sees a distance beyond the budget. With `positions=auto` (the default) that is done where positions
    are rotary; elsewhere entries keep their positions in the text.

    Fields: those of `CachePolicy`, with `sinks=4`.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "streaming:entries=8"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> out.past_key_values.layers[0].positions[0, 0].tolist()
        [0, 1, 2, 3, 36, 37, 38, 39]
    """

    paper: ClassVar[Paper | None] = Paper(
        "Efficient Streaming Language Models with Attention Sinks", 2023, "https://arxiv.org/abs/2309.17453"
    )
    claim: ClassVar[str] = "four first tokens kept beside a window make streams of any length stable"

    sinks: int = 4
    positions: str = "auto"

    def score(self, view: CacheView) -> Tensor:
        return view.positions.float()


@claim("streaming")
class SinksRestoreTheWindow(Claim):
    statement: ClassVar[str] = (
        "a window alone breaks when the first token is evicted; four first tokens kept beside it restore the "
        "perplexity, which then tracks recomputing the window for every token (figure 3, table 1)"
    )
    setting: ClassVar[str] = (
        "512 entries; 4,096 tokens in chunks of 32, the 3,584 after the first eviction; recomputation: 512 tokens "
        "from nothing for every 32 scored"
    )

    size: ClassVar[int] = 512
    length: ClassVar[int] = 4096
    chunk: ClassVar[int] = 32

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=self.length, chunk=self.chunk, skip=self.size), of=10)
        window = streams.read(f"window:entries={self.size}")
        sinks = streams.read(f"streaming:entries={self.size}")
        again = self.recomputed(bench, done=0.2)
        half = len(sinks.nll) // 2
        late = Stream(sinks.nll[half:], sinks.tokens[half:]).over(Stream(again.nll[half:], again.tokens[half:]))
        broken, tracks = window.over(sinks), sinks.over(again)
        return Finding(
            {
                "perplexity, window": window.perplexity,
                "perplexity, four sinks and window": sinks.perplexity,
                "perplexity, recomputation": again.perplexity,
                "window over four sinks": broken,
                "four sinks over recomputation": tracks,
                "four sinks over recomputation, second half": late,
            },
            {
                "the window alone is broken (over 1.2 times, interval included)": broken.low > 1.2,
                "four sinks track recomputation within 5%": 0.95 < tracks.value < 1.05,
                "and still do in the second half": 0.95 < late.value < 1.05,
            },
        )

    @torch.no_grad()
    def recomputed(self, bench: Bench, done: float) -> Stream:
        """The same chunks, each predicted by a forward over the `size` tokens that end with it."""
        ids = tokens(bench.text.evaluation, bench.tokenizer, self.length).to(bench.model.device)
        nll, counts = [], []
        for end in range(self.size + self.chunk, self.length + 1, self.chunk):
            piece = ids[:, end - self.size : end]
            logits = bench.model(piece, use_cache=False, logits_to_keep=self.chunk + 1).logits
            nll.append(float(surprisal(logits[:, :-1], piece[:, -self.chunk :]).double().sum()))
            counts.append(self.chunk)
            bench.progress(done + (1 - done) * end / self.length)
        return Stream(nll, counts)
