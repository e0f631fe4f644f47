"""The full cache: every entry stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from foveate.methods import Method, Target, method


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
