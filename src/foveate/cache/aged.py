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
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, perplexity, perplexity_ratio
from foveate.methods import Recipe, apply, method
from foveate.models.caches import cache_bytes, full_cache_bytes
from foveate.tasks.base import Bench, passages, read, surprisal
from foveate.tasks.passkey import Passkey


@method("aged")
class Aged(CachePolicy):
    """Hold every entry, the newest tokens in more bits than the others.

    What a model looks at most is what it has just read, and errors there cost most while text is generated.

    Fields: those of `CachePolicy`, with `keep=1`: nothing is evicted unless less is asked for; then the oldest goes.
        fresh: newest tokens that stay in the code's `best`; a forward's own tokens are always attended to as they are.
        middle: tokens before these that stay in the code's `middle`.
        code: `tiers(best=...,rest=...)`, with `middle=...` if there are such tokens.

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
    fresh: int = 8
    middle: int = 0
    code: Coding | None = Tiers(best=Groups(bits=8), rest=Product(share=0.1))

    def __post_init__(self) -> None:
        if self.entries is not None and self.keep == 1:
            object.__setattr__(self, "keep", None)  # the default gives way to a number of entries
        super().__post_init__()
        for what in ("fresh", "middle"):
            if getattr(self, what) < 0:
                raise FoveateError(f"{self.name}: {what}={getattr(self, what)} is negative: give 0 or more.")
        if self.code is not None and not isinstance(self.code, Tiers):
            raise FoveateError(f"{self.name}: give a code of tiers, tiers(best=...,rest=...), or none.")
        if self.code is not None and (self.middle > 0) != (self.code.middle is not None):
            raise FoveateError(
                f"{self.name}: middle={self.middle} tokens, and the code's middle is {self.code.middle or 'none'}: "
                "give both, middle=128,code=tiers(best=...,middle=...,rest=...), or neither."
            )

    def score(self, view: CacheView) -> Tensor:
        return view.positions.float()

    def tier(self, view: CacheView) -> Tensor:
        age = view.seen - view.positions  # the newest is 1
        tier = (age > self.fresh).to(torch.uint8)
        return tier + (age > self.fresh + self.middle).to(torch.uint8) if self.middle else tier


@method("fifth-cache")
class FifthCache(Aged):
    """A fifth of the full cache's bytes in 16 bits, from a thousand tokens on: all entries, in few bits.

    Fields: those of `aged`.

    Example:
        >>> from foveate.methods import Recipe
        >>> str(Recipe.of("fifth-cache").methods[0].code)
        'tiers:best=groups(bits=8),rest=product(share=0.185)'
    """

    claim: ClassVar[str] = "a fifth of the bytes finds every passkey, at 0.6% more perplexity at most"

    fresh: int = 34
    code: Coding | None = Tiers(best=Groups(bits=8), rest=Product(share=0.185))


@method("tenth-cache")
class TenthCache(Aged):
    """A tenth of the full cache's bytes in 16 bits, from a thousand tokens on: all entries, in few bits.

    Fields: those of `aged`.

    Example:
        >>> from foveate.methods import Recipe
        >>> str(Recipe.of("tenth-cache").methods[0].code)
        'tiers:best=groups(bits=8),middle=product(share=0.185),rest=product(share=0.085)'
    """

    claim: ClassVar[str] = "a tenth of the bytes finds 19 of 20 passkeys, at 2% more perplexity at most"

    fresh: int = 16
    middle: int = 38
    code: Coding | None = Tiers(best=Groups(bits=8), middle=Product(share=0.185), rest=Product(share=0.085))


@method("twentieth-cache")
class TwentiethCache(Aged):
    """A twentieth of the full cache's bytes in 16 bits, from a thousand tokens on: all entries, in few bits.

    Fields: those of `aged`.

    Example:
        >>> from foveate.methods import Recipe
        >>> str(Recipe.of("twentieth-cache").methods[0].code)
        'tiers:best=groups(bits=8),middle=product(share=0.085),rest=product(share=0.036)'
    """

    claim: ClassVar[str] = "a twentieth of the bytes finds 9 of 10 passkeys, at 6% more perplexity at most"

    fresh: int = 8
    middle: int = 128
    code: Coding | None = Tiers(best=Groups(bits=8), middle=Product(share=0.085), rest=Product(share=0.036))


class KeepsItsBudget(Claim):
    """A recipe's goals: bytes, pass keys, and the perplexity of what follows on a passage."""

    setting: ClassVar[str] = (
        "prompts of 1,030 tokens in one forward; 20 pass keys, asked for after the prompt; 8 passages of the text, the "
        "256 tokens after each prompt in one forward; bytes after the prompt, over the full cache in 16 bits"
    )
    share: ClassVar[float]
    found: ClassVar[float]
    loss: ClassVar[float]

    def run(self, bench: Bench) -> Finding:
        nll: dict[str, list[float]] = {}
        held = 0
        for done, recipe in enumerate(("full", self.method)):
            nll[recipe] = []
            with apply(bench.model, recipe, tokenizer=bench.tokenizer):
                for ids in passages(bench, 8, 1030 + 256):
                    last, cache = read(bench.model, ids[:, :1030], last=1)
                    held = cache_bytes(cache)
                    logits, _ = read(bench.model, ids[:, 1030:], cache)
                    logits = torch.cat([last, logits[:, :-1]], dim=1)
                    nll[recipe].append(float(surprisal(logits, ids[:, 1030:]).double().sum()))
            bench.progress((done + 1) / 4)
        keys = {recipe: Passkey(cases=20, tokens=1030).measure(bench, Recipe.of(recipe)) for recipe in nll}
        full = full_cache_bytes(bench.model, 1030) * 2 // bench.model.dtype.itemsize
        over = perplexity_ratio(nll[self.method], nll["full"], [256] * 8)
        ours = keys[self.method].metrics["passkey"]
        wanted = min(self.found, keys["full"].metrics["passkey"].value)
        return Finding(
            {
                "bytes over the full cache's in 16 bits": Metric.exact(held / full),
                "pass keys found": ours,
                "pass keys found, full cache": keys["full"].metrics["passkey"],
                "perplexity, full cache": perplexity(nll["full"], [256] * 8),
                "perplexity over full": over,
            },
            {
                f"at most {self.share:.0%} of the bytes": held <= self.share * full,
                f"{self.found:.0%} of the pass keys, or as many as the full cache finds": ours.value >= wanted,
                f"at most {self.loss:.1%} more perplexity": over.value <= 1 + self.loss,
            },
        )


@claim("fifth-cache")
class FifthKeepsItsBudget(KeepsItsBudget):
    statement: ClassVar[str] = (
        "a fifth of the bytes finds every pass key that the full cache finds, at no more than 0.6% more perplexity "
        "(ours)"
    )
    share, found, loss = 0.2, 1.0, 0.006


@claim("tenth-cache")
class TenthKeepsItsBudget(KeepsItsBudget):
    statement: ClassVar[str] = (
        "a tenth of the bytes finds 19 of 20 pass keys, at no more than 2% more perplexity (ours)"
    )
    share, found, loss = 0.1, 0.95, 0.02


@claim("twentieth-cache")
class TwentiethKeepsItsBudget(KeepsItsBudget):
    statement: ClassVar[str] = (
        "a twentieth of the bytes finds 9 of 10 pass keys, at no more than 6% more perplexity (ours)"
    )
    share, found, loss = 0.05, 0.9, 0.06
