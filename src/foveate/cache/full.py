"""The full cache: every entry stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from foveate.claims import Claim, Finding, Streams, claim
from foveate.methods import Method, Target, method
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("full")
class Full(Method):
    """The model as it is, on its own cache: the baseline of every comparison.

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "full") as recipe:
        ...     print(recipe)
        full
    """

    role: ClassVar[str] = "cache"
    claim: ClassVar[str] = "the baseline: nothing is left out"

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        yield


@claim("full")
class SameInChunksAsWhole(Claim):
    """Not a paper's claim but the harness's own: what all others are measured against is the model itself."""

    statement: ClassVar[str] = "a text read in chunks onto the full cache is predicted as in one forward"
    setting: ClassVar[str] = "2,048 tokens of the evaluation text, in chunks of 128 and in one piece"

    def run(self, bench: Bench) -> Finding:
        chunked = Streams(bench, Perplexity(tokens=2048, chunk=128), of=2).read("full").perplexity
        whole = Streams(bench, Perplexity(tokens=2048, chunk=2048), of=2).read("full").perplexity
        return Finding(
            {"perplexity in chunks": chunked, "perplexity in one piece": whole},
            {"the two perplexities differ by less than 0.1%": abs(chunked.value / whole.value - 1) < 1e-3},
        )
