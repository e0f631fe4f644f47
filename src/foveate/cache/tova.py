"""TOVA: the tokens that the last one attends to."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView, Received
from foveate.claims import Claim, Finding, Streams, claim
from foveate.methods import Paper, method
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("tova")
class TOVA(CachePolicy):
    """Keep the tokens that receive most attention from the last one, the same ones for all heads of a layer.

    The score of a token is the attention weight that the last query gives it, averaged over all query heads of the
    layer (section 3.3). Nothing is summed over time, and no recent window is reserved. Where a budget gives some KV
    heads more entries than others, a token's average is over the heads that still hold it.

    Fields: those of `CachePolicy`.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "tova:entries=8"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> first, second = out.past_key_values.layers[0].positions[0].tolist()
        >>> first == second
        True
    """

    paper: ClassVar[Paper | None] = Paper("Transformers are Multi-State RNNs", 2024, "https://arxiv.org/abs/2401.06104")
    claim: ClassVar[str] = "an eighth of the entries, those that the last token attends to, nearly keeps the quality"

    def received(self) -> Received:
        return Received(last=1)

    def score(self, view: CacheView) -> Tensor:
        assert view.received is not None  # asked for above
        received = view.received.flatten(1)
        token = (view.positions + 1).long().flatten(1)  # heads may hold different tokens; empty slots become token 0
        table = received.new_zeros(len(received), int(view.seen.max()) + 1)
        table = table.scatter_reduce(1, token, received, "mean", include_self=False)
        return table.gather(1, token).view_as(view.received)


@claim("tova")
class NearlyOnParAtAnEighth(Claim):
    statement: ClassVar[str] = (
        "dropping the token that the last one attends to least beats all other policies, and is nearly on par with the "
        "full cache at an eighth of it in some cases (abstract)"
    )
    setting: ClassVar[str] = "256 entries; 2,048 tokens in chunks of 8, the 1,792 after the first eviction"

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, chunk=8, skip=256), of=5)
        full = streams.read("full")
        tova = streams.read("tova:entries=256")
        others = {
            "recent tokens only": streams.read("window:entries=256"),
            "four sinks and recent tokens": streams.read("window:entries=256,sinks=4"),
            "h2o": streams.read("h2o:entries=256"),
        }
        return Finding(
            {"perplexity, full cache": full.perplexity, "over full: tova": tova.over(full)}
            | {f"over full: {name}": stream.over(full) for name, stream in others.items()},
            {"nearly on par with the full cache (within 5%)": tova.over(full).value < 1.05}
            | {f"better than {name}": tova.below(stream) for name, stream in others.items()},
        )
