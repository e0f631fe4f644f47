"""Aged: every entry stays, the newest well and the others in few bits. And the recipes that ship by name."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.base import CachePolicy
from foveate.cache.coders.base import Coding
from foveate.cache.coders.groups import Groups
from foveate.cache.coders.product import Product
from foveate.cache.coders.tiers import Tiers
from foveate.cache.entries import CacheView
from foveate.errors import FoveateError
from foveate.methods import method


@method("aged")
class Aged(CachePolicy):
    """Hold every entry, the `fresh` newest tokens in one code and the others in another.

    What a model looks at most is what it has just read, and errors there cost most while text is generated.

    Fields: those of `CachePolicy`, with `keep=1`: nothing is evicted unless less is asked for; then the oldest goes.
        fresh: newest tokens that stay in the code's `best`; a forward's own tokens are always attended to as they are.
        code: `tiers(best=...,rest=...)`.

    Example:
        >>> import foveate as fv, torch
        >>> model, prompt = fv.tiny("llama"), torch.arange(3, 103).unsqueeze(0)
        >>> with fv.apply(model, "aged:fresh=10,code=none"):  # without a code, it is the full cache
        ...     out = model(prompt, use_cache=True)
        >>> int(out.past_key_values.layers[0].held().max())
        100
    """

    claim: ClassVar[str] = "bits where they are read: the newest entries well, the rest barely"
    tiers: ClassVar[bool] = True

    keep: float | None = 1.0
    sinks: int = 4
    fresh: int = 24
    code: Coding | None = Tiers(best=Groups(bits=4), rest=Product(share=0.1))

    def __post_init__(self) -> None:
        if self.entries is not None and self.keep == 1:
            object.__setattr__(self, "keep", None)  # the default gives way to a number of entries
        super().__post_init__()
        if self.fresh < 0:
            raise FoveateError(f"{self.name}: fresh={self.fresh} is negative: give 0 or more.")
        if self.code is not None and not isinstance(self.code, Tiers):
            raise FoveateError(f"{self.name}: give a code of two tiers, tiers(best=...,rest=...), or none.")

    def score(self, view: CacheView) -> Tensor:
        return view.positions.float()

    def tier(self, view: CacheView) -> Tensor:
        return (view.positions < view.seen - self.fresh).to(torch.uint8)


@method("fifth-cache")
class FifthCache(Aged):
    """A fifth of the full cache's bytes in 16 bits, from a thousand tokens on: all entries, in few bits.

    Fields: those of `aged`.

    Example:
        >>> from foveate.methods import Recipe
        >>> str(Recipe.of("fifth-cache").methods[0].code)
        'tiers:rest=product(share=0.185)'
    """

    claim: ClassVar[str] = "a fifth of the bytes finds every passkey, at 0.6% more perplexity at most"

    code: Coding | None = Tiers(best=Groups(bits=4), rest=Product(share=0.185))


@method("tenth-cache")
class TenthCache(Aged):
    """A tenth of the full cache's bytes in 16 bits, from a thousand tokens on: all entries, in few bits.

    Fields: those of `aged`.

    Example:
        >>> from foveate.methods import Recipe
        >>> str(Recipe.of("tenth-cache").methods[0].code)
        'tiers:rest=product(share=0.085)'
    """

    claim: ClassVar[str] = "a tenth of the bytes finds 19 of 20 passkeys, at 2% more perplexity at most"

    code: Coding | None = Tiers(best=Groups(bits=4), rest=Product(share=0.085))


@method("twentieth-cache")
class TwentiethCache(Aged):
    """A twentieth of the full cache's bytes in 16 bits, from a thousand tokens on: all entries, in few bits.

    Fields: those of `aged`.

    Example:
        >>> from foveate.methods import Recipe
        >>> str(Recipe.of("twentieth-cache").methods[0].code)
        'tiers:rest=product(share=0.036)'
    """

    claim: ClassVar[str] = "a twentieth of the bytes finds 9 of 10 passkeys, at 6% more perplexity at most"

    code: Coding | None = Tiers(best=Groups(bits=4), rest=Product(share=0.036))
