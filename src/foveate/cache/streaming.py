"""StreamingLLM: attention sinks and a window, at positions inside the cache."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from foveate.cache.base import CachePolicy, CacheView
from foveate.methods import Paper, method


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
