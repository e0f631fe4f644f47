"""Unified layer skipping: the same evenly spaced layers are left out for every token."""

from __future__ import annotations

from typing import ClassVar

from foveate.depth.base import DepthPlan
from foveate.errors import FoveateError
from foveate.methods import Paper, check_fraction, method
from foveate.models.anatomy import Anatomy


def spread(layers: int, skipped: int) -> list[int]:
    """`skipped` indices, evenly spaced over the layers between the first and the last.

    Example:
        >>> spread(12, 2)
        [3, 8]
    """
    between = layers - 2
    return [1 + (2 * i + 1) * between // (2 * skipped) for i in range(skipped)]


@method("skip-layers")
class SkipLayers(DepthPlan):
    """Run a fixed fraction of the layers; those left out are spaced evenly, the first and the last always run.

    The number of layers follows from the target speed-up alone (section 3 of the paper): `keep` is its inverse, so
    a target of 1.25 is `keep=0.8`. Batches and caches work unchanged, because every token skips the same layers. The
    paper fine-tunes the model with the layers left out; here it is used as it is.

    Fields: `keep`, the fraction of layers that run, in (0, 1].

    Example:
        >>> import foveate as fv
        >>> SkipLayers(keep=0.5).plan(fv.anatomy(fv.tiny("llama", num_hidden_layers=6)))
        [0, 2, 5]
    """

    paper: ClassVar[Paper | None] = Paper(
        "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy",
        2024,
        "https://arxiv.org/abs/2404.06954",
    )
    claim: ClassVar[str] = "evenly spaced layers hurt less when skipped than a block of neighbours"

    keep: float

    def __post_init__(self) -> None:
        check_fraction(self.name, self.keep)

    def plan(self, parts: Anatomy) -> list[int]:
        layers = len(parts.layers)
        skipped = layers - round(self.keep * layers)
        if skipped > layers - 2:
            raise FoveateError(
                f"skip-layers: keep={self.keep} would skip {skipped} of {layers} layers, but the first and the last "
                f"always run: keep at least {2 / layers:.2f}."
            )
        out = set(spread(layers, skipped))
        return [i for i in range(layers) if i not in out]
