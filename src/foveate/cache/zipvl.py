"""ZipVL: important entries in more bits, the others in fewer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.base import CachePolicy
from foveate.cache.coders.base import Coding
from foveate.cache.coders.groups import Groups
from foveate.cache.coders.tiers import Tiers
from foveate.cache.entries import CacheView, Received
from foveate.claims import Claim, Finding, Streams, claim
from foveate.errors import FoveateError
from foveate.methods import Paper, method
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("zipvl")
class ZipVL(CachePolicy):
    """Hold every entry, the important ones in more bits; how many are important, each layer's attention says.

    After a prompt (or a piece of one), the tokens that received most attention and together hold `mass` of a layer's
    are important (section 3.2): where attention gathers on few tokens, few are. Which ones is decided by the
    normalised attention, divided by how many queries could see the token, so that early ones have no advantage; the
    same tokens for all heads of a layer. They and what is generated are held in the code's `best`, the others in its
    `rest` (section 3.3).

    Where this departs: for text; the prefill attends to everything (the paper's attends to the important tokens only,
    to save time); all queries are counted, not a sample of probes; an entry never comes back to more bits.

    Fields: those of `CachePolicy`, with `keep=1`: nothing is evicted unless less is asked for.
        mass: the part of the attention that important tokens hold, the paper's tau; it uses 0.96 and 0.975.
        code: of two tiers; 4 and 2 bits by default.

    Example:
        >>> import foveate as fv, torch
        >>> model, prompt = fv.tiny("llama"), torch.arange(3, 103).unsqueeze(0)
        >>> code = "tiers(best=groups(group=16),rest=groups(bits=2,group=16))"
        >>> with fv.apply(model, f"zipvl:mass=0.5,code={code}", calibration=prompt):
        ...     out = model(prompt, use_cache=True)
        >>> [int(layer.padded.tier[0, 0].sum()) > 20 for layer in out.past_key_values.layers]  # entries in 2 bits
        [True, True, True, True]
    """

    paper: ClassVar[Paper | None] = Paper(
        "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression",
        2024,
        "https://arxiv.org/abs/2410.08584",
    )
    claim: ClassVar[str] = "few tokens matter, another share in each layer; the others bear half the bits"
    tiers: ClassVar[bool] = True

    keep: float | None = 1.0
    mass: float = 0.975
    code: Coding | None = Tiers(best=Groups(bits=4), rest=Groups(bits=2))

    def __post_init__(self) -> None:
        if self.entries is not None and self.keep == 1:
            object.__setattr__(self, "keep", None)  # the default gives way to a number of entries
        super().__post_init__()
        if not 0 < self.mass <= 1:
            raise FoveateError(f"zipvl: mass={self.mass} is outside (0, 1]: give a part of the attention.")
        if self.code is not None and (not isinstance(self.code, Tiers) or self.code.middle is not None):
            raise FoveateError("zipvl: give a code of two tiers, tiers(best=...,rest=...), or none.")

    def received(self) -> Received:
        return Received()

    def score(self, view: CacheView) -> Tensor:
        assert view.received is not None  # asked for above
        return view.received

    def tier(self, view: CacheView) -> Tensor:
        assert view.received is not None
        live = view.positions >= 0
        if view.query.shape[2] == 1:
            return torch.zeros_like(view.positions, dtype=torch.uint8)
        received = view.received.masked_fill(~live, 0).sum(1, keepdim=True)
        ordered = received.sort(-1, descending=True).values
        important = ((ordered.cumsum(-1) - ordered) < self.mass * ordered.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        fair = (received / (view.seen - view.positions[:, :1]).clamp(min=1)).masked_fill(~live[:, :1], -1)
        rank = fair.argsort(-1, descending=True).argsort(-1)
        return (rank >= important).expand_as(live).to(torch.uint8)


@claim("zipvl")
class FewTokensMatter(Claim):
    statement: ClassVar[str] = (
        "layers differ in how many tokens hold most of their attention; holding these in 4 bits and the others in 2 "
        "loses less than the same bytes spent evenly, and than the same shares of tokens chosen at random (section 4)"
    )
    setting: ClassVar[str] = "2,048 tokens in pieces of 512, so that most are read from coded entries"

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, window=2048, chunk=512, skip=512), of=5)
        full = streams.read("full")
        ours = streams.read("zipvl")
        low, high = streams.read("window:keep=1,code=groups(bits=2)"), streams.read("window:keep=1,code=groups(bits=4)")
        chance = streams.read(_AnyTokens())
        return Finding(
            {
                "perplexity, full cache": full.perplexity,
                "4 and 2 bits over full": ours.over(full),
                "2 bits over full": low.over(full),
                "4 bits over full": high.over(full),
                "as many tokens, chosen at random, over full": chance.over(full),
            },
            {
                "within 5% of the full cache": ours.over(full).value < 1.05,
                "better than 2 bits for all": ours.below(low),
                "better than as many tokens chosen at random": ours.below(chance),
            },
        )


class _AnyTokens(ZipVL):
    """The control: as many tokens in more bits, but any."""

    def tier(self, view: CacheView) -> Tensor:
        tier = super().tier(view)
        order = torch.rand(tier.shape[0], 1, tier.shape[2], generator=torch.Generator().manual_seed(view.layer))
        at = order.argsort(-1).to(tier.device).expand_as(view.positions)
        return tier.gather(-1, at)
