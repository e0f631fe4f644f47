"""Density: layers whose attention is spread over many tokens keep more."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from foveate.cache.budgets.base import Budget, budget
from foveate.cache.budgets.trial import BeatsUniform
from foveate.claims import claim
from foveate.errors import FoveateError
from foveate.methods import Paper

if TYPE_CHECKING:
    from foveate.cache.entries import CacheView


@budget("density")
class Density(Budget):
    """A layer's share falls with the variance of what its entries receive: softmax over layers of -variance.

    The paper's layer-level operation. Attention is dense where all entries receive alike, and the variance is small.
    The variance is that of the attention summed over the queries of the prompt, averaged over KV heads.

    Where this departs: the plain variance grows with the prompt, and the softmax would give all to one layer, so some
    normalisation is needed. The authors' code scales each layer's heads between the least and the most variance among
    them, which hides differences between layers. Here the variance is given as a part of the most there can be (one
    entry receives everything), so 0 is even and 1 is a single entry, for any layer, head and length. The first two
    layers and the last, which that code never compresses, are like all others, so that the total is kept.

    Fields:
        sharpness: what the variance is multiplied by before the softmax; 1 is the paper's, 0 is `uniform`. At 1, no
            layer gets more than e times as much as another.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "h2o:entries=8,budget=density(sharpness=100)"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> sum(int(layer.held()[0, 0]) for layer in out.past_key_values.layers) <= 4 * 8
        True
    """

    measured: ClassVar[bool] = True
    paper: ClassVar[Paper | None] = Paper(
        "D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large Language Models",
        2024,
        "https://arxiv.org/abs/2406.13035",
    )
    claim: ClassVar[str] = "layers with dense attention lose more by eviction, so they keep more"

    sharpness: float = 1.0

    def __post_init__(self) -> None:
        if not self.sharpness >= 0:
            raise FoveateError(f"density: sharpness={self.sharpness} is negative: give 0 (uniform) or more.")

    def measure(self, view: CacheView) -> Tensor:
        assert view.received is not None  # a measured budget's is there
        live = view.positions >= 0
        count = live.sum(-1).clamp(min=2).double()  # of a single entry, the variance is 0
        received = view.received.double().masked_fill(~live, 0)
        share = received / received.sum(-1, keepdim=True).clamp(min=1e-30)
        even = 1 / count
        # Shares sum to 1, so their variance is (their mean square - even^2); a single one has (even - even^2).
        square = share.square().sum(-1).where(live.sum(-1) > 1, even)
        variance = ((square - even) / (1 - even)).mean(-1, keepdim=True)
        return (-self.sharpness * variance).exp().expand(-1, live.shape[1])


@claim("density")
class DensityBeatsUniform(BeatsUniform):
    statement: ClassVar[str] = (
        "layers with dense attention need more entries: at the same total, budgets by density are better than "
        "the same for all (abstract)"
    )
