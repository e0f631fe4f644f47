"""Window attention: only the most recent entries stay."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from foveate.cache.base import CachePolicy, CacheView
from foveate.methods import Paper, method


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
