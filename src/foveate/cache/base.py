"""The cache role: which key-value entries stay. A technique scores entries; everything else is the role's.

`entries.py` holds the entries and evicts, `attend.py` attends over them, `session.py` ties both to a model.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.cache.budgets.base import Budget
from foveate.cache.budgets.uniform import Uniform
from foveate.cache.coders.base import Coder, Coding
from foveate.cache.entries import CacheView, Received
from foveate.cache.session import in_force
from foveate.errors import FoveateError
from foveate.methods import Method, Target, check_fraction
from foveate.models.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class CachePolicy(Method):
    """Base of all cache policies. A technique overrides `score`; eviction, budgets, sinks and positions are here.

    Fields:
        keep: the fraction of the prompt's tokens that a KV head holds on the average; of `context` where the caller
            of `apply` states one. The prompt is what came in forwards of more than one token; it is rounded down, but
            never below `sinks` + 1. Generated tokens don't raise it. `keep=1` without a stated context keeps
            everything, generated tokens too.
        entries: the number of entries that a KV head holds on the average. Exactly one of `keep` and `entries` is
            given.
        budget: how these are spread over layers and KV heads: `uniform`, `pyramid`, ... (`foveate.cache.budgets`).
        code: how entries are written, in fewer bits: `groups(bits=4)`, ... (`foveate.cache.coders`); None: as they are.
        sinks: this many first tokens of the text are never evicted.
        recent: this fraction of the budget is reserved for the most recent tokens (never less than the last one).
        positions: "text": entries keep their positions in the text. "cache": entries are renumbered by their place
            in the cache whenever they are attended to, so that distances never exceed the budget; needs rotary
            positions.
        grows: whether `keep` is a fraction of all tokens so far, generated ones too.
    """

    role: ClassVar[str] = "cache"
    merges: ClassVar[bool] = False
    """Whether `merge` is to be asked before entries go."""
    evicts: ClassVar[bool] = True
    """Whether entries beyond the budget go. False: all stay, and the budget is what `reads` may pick of them."""

    tiers: ClassVar[bool] = False
    """Whether `tier` is to be asked which entries a coder holds less well."""

    keep: float | None = None
    entries: int | None = None
    budget: Budget = Uniform()
    code: Coding | None = None
    sinks: int = 0
    recent: float = 0.0
    positions: str = "text"
    grows: bool = False

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.entries is None):
            raise FoveateError(
                f"{self.name}: give the budget as keep=f (a fraction of the prompt) or as entries=N (per KV head), "
                f"{'one of them' if self.keep is None else 'not both'}."
            )
        if self.keep is not None:
            check_fraction(self.name, self.keep)
        if self.sinks < 0:
            raise FoveateError(f"{self.name}: sinks={self.sinks} is negative: give 0 or more.")
        if self.entries is not None and self.entries <= self.sinks:
            raise FoveateError(
                f"{self.name}: entries={self.entries} leaves no room beside {self.sinks} sinks: give at least "
                f"{self.sinks + 1}."
            )
        if not 0 <= self.recent <= 1:
            raise FoveateError(f"{self.name}: recent={self.recent} is outside [0, 1]: it is a fraction of the budget.")
        if self.positions not in ("text", "cache", "auto"):
            raise FoveateError(f"{self.name}: positions={self.positions} is not one of text, cache, auto.")
        self.budget.check(self.name, self.keep)

    @abstractmethod
    def score(self, view: CacheView) -> Tensor:
        """How much each entry matters, float (batch, kv_head, entry): the lowest are evicted first.

        Sinks, the recent window and empty slots are the base's: their scores are overruled.
        """

    def received(self) -> Received | None:
        """Which attention weights `view.received` sums; None: `score` doesn't read it, and attention is faster."""
        return None

    def observe(self, view: CacheView) -> None:
        """Called in each forward, before `score`, also where nothing is evicted; may note things in `view.state`."""

    def merge(self, kept: CacheView, gone: CacheView) -> tuple[Tensor, Tensor] | None:
        """New keys and values, in the shapes of the kept ones, that make up for what goes; None: it just goes.

        Asked only of a policy that sets `merges`.
        """
        return None

    def tier(self, view: CacheView) -> Tensor:
        """How well a coder is to hold each entry, uint8 (batch, kv_head, entry): 0 = best.

        Asked after eviction, and only of a policy that sets `tiers` and has a `code`.
        """
        raise NotImplementedError(f"{self.name} sets tiers but overrides no tier")

    def reads(self, view: CacheView, limit: Tensor, most: int) -> Tensor | None:
        """Which entries a forward of one token attends to: index, int64 (batch, kv_head, n), -1 = none; None: all.

        Asked only of a policy that does not evict, before the attention; longer forwards attend to everything. What
        entries receive is noted of sequences that read all they hold; of the others, what was noted before stands.

        Args:
            limit: int64 (batch, kv_head, 1): entries that each KV head may read; `most`: the most of any.
        """
        return None

    def watches(self) -> Received | None:
        """What is noted of the attention that entries receive: for the policy's scores, or for the budget."""
        return self.received() or (Received() if self.budget.measured else None)

    def capacity(self, prompt: int, context: int | None) -> int | None:
        """Entries that a KV head of a sequence may hold on the average; None = without limit."""
        if self.entries is not None:
            return self.entries
        if self.keep == 1 and context is None:
            return None
        assert self.keep is not None  # by __post_init__
        return max(math.floor(self.keep * (context or prompt) + 1e-9), self.sinks + 1)

    def coder(self, target: Target) -> Coder | None:
        """What writes the entries of this model; None: they are held as they are."""
        return None if self.code is None else self.code.coder(target)

    def weights(self, target: Target) -> Tensor | None:
        """How entries are spread over the KV heads, as `Budget.weights`; None: the budget measures that."""
        return None if self.budget.measured else self.budget.weights(target, self.keep)

    def renumbers(self, parts: Anatomy) -> bool:
        """Whether entries are attended to at their places in the cache on this model."""
        able = parts.positions == "rotary" and parts.rotary_is_static
        if self.positions == "cache" and not able:
            raise FoveateError(
                f"{self.name}: positions=cache moves keys by rotating them, which needs rotary positions of fixed "
                f"frequencies; this {parts.family} model has none: use positions=text."
            )
        return self.positions == "cache" or (self.positions == "auto" and able)

    def applied(self, target: Target) -> AbstractContextManager[None]:
        return in_force(self, target)
