"""Adaptive: as many entries as it takes to hold most of the attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.cache.budgets.base import Budget, budget
from foveate.cache.budgets.trial import BeatsUniform
from foveate.claims import claim
from foveate.errors import FoveateError
from foveate.methods import Paper

if TYPE_CHECKING:
    from foveate.cache.entries import CacheView


@budget("adaptive")
class Adaptive(Budget):
    """A layer's share is the fraction of its tokens that together received `mass` of the attention (equation 6).

    Where attention gathers on few tokens, few are needed. The attention is that summed over queries, and over all heads
    of the layer. As in the paper it isn't divided by how many queries could see a token; there, that normalised score
    only chooses which tokens stay, which is the policy's task here.

    Where this departs: the paper has no fixed total, each layer just keeps that fraction. Here the fractions are
    weights, and the policy's `keep` or `entries` sets the total. All queries are counted, not a sample of probes. Of a
    text read in pieces, the fraction is of what is held still, and of what that received.

    Fields:
        mass: the part of the attention that is to be held, the paper's tau; it uses 0.96 and 0.975.
        heads: whether each KV head is measured by itself; in the paper, all heads of a layer hold the same tokens.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "h2o:entries=8,budget=adaptive(mass=0.5,heads=true)"):
        ...     out = model(torch.arange(1, 41).unsqueeze(0), use_cache=True)
        >>> sum(int(held) for layer in out.past_key_values.layers for held in layer.held()[0]) <= 4 * 2 * 8
        True
    """

    measured: ClassVar[bool] = True
    paper: ClassVar[Paper | None] = Paper(
        "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression",
        2024,
        "https://arxiv.org/abs/2410.08584",
    )
    claim: ClassVar[str] = "how many tokens hold most of a layer's attention says how many it needs"

    mass: float = 0.975
    heads: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise FoveateError(f"adaptive: mass={self.mass} is outside (0, 1]: give a part of the attention.")

    def measure(self, view: CacheView) -> Tensor:
        assert view.received is not None  # a measured budget's is there
        live = view.positions >= 0
        received = view.received.double().masked_fill(~live, 0)
        if not self.heads:
            # After an eviction, a token may stand in another slot in each head: sum by its position in the text.
            at = view.positions.clamp(min=0).long().flatten(1)
            tokens = torch.zeros(len(at), int(at.max()) + 1, dtype=received.dtype, device=at.device)
            live = tokens.scatter_add(1, at, live.flatten(1).double())[:, None] > 0
            received = tokens.scatter_add(1, at, received.flatten(1))[:, None]
        most_first = received.sort(-1, descending=True).values
        held_before = most_first.cumsum(-1) - most_first
        needed = (held_before < self.mass * received.sum(-1, keepdim=True)) & (most_first > 0)
        return (needed.sum(-1) / live.sum(-1).clamp(min=1)).expand(-1, view.positions.shape[1])


@claim("adaptive")
class AdaptiveBeatsUniform(BeatsUniform):
    statement: ClassVar[str] = (
        "layers differ in how many tokens they need: at the same total, budgets by the attention's mass are "
        "better than the same for all (section 4)"
    )
