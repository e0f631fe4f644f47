"""H2O: recent entries and heavy hitters."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from foveate.cache.base import CachePolicy, CacheView
from foveate.methods import Paper, method


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
    needs_received: ClassVar[bool] = True

    recent: float = 0.5

    def score(self, view: CacheView) -> Tensor:
        assert view.received is not None  # asked for above
        return view.received
