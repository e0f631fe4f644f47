"""The convert role: what stands in for a module. A technique makes the replacements; putting them in is here."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from foveate.errors import FoveateError
from foveate.methods import Change, Target
from foveate.models.surgery import Surgery


class Converter(Change):
    """Base of techniques that put cheaper modules in the place of a model's own. A technique writes `converted`.

    What stands in is a portable module (`foveate.portable`), so that a converted model can be saved and opens where
    foveate is not installed. Inside `apply` the modules are swapped, and put back at the end of the block.
    """

    role: ClassVar[str] = "convert"

    @abstractmethod
    def converted(self, target: Target) -> dict[str, nn.Module]:
        """Path in the model -> the module that stands there from now on; paths don't overlap.

        The model itself stays as it is: a replacement may share parameters with what it replaces, but what is in the
        model must not be changed.
        """

    def change(self, target: Target, surgery: Surgery) -> None:
        modules = self.converted(target)
        for path, module in modules.items():
            surgery.swap(target.model, path, module)
        for module in modules.values():
            tie: Any = getattr(module, "tie", None)
            if tie is not None:
                tie(target.model)


def numbers(layers: str, count: int, who: str) -> set[int]:
    """The layers that a spec names, of `count`.

    Example:
        >>> sorted(numbers("0-2/5", 6, "lolcats")), sorted(numbers("odd", 6, "lolcats"))
        ([0, 1, 2, 5], [1, 3, 5])
    """
    if layers in ("all", "even", "odd"):
        start, step = {"all": (0, 1), "even": (0, 2), "odd": (1, 2)}[layers]
        return set(range(start, count, step))
    found: set[int] = set()
    for piece in layers.split("/"):
        first, _, last = piece.partition("-")
        try:
            these = range(int(first), int(last or first) + 1)
        except ValueError:
            these = range(0)
        if not these or these[-1] >= count:
            raise FoveateError(
                f"{who}: layers={layers} can't be read for {count} layers: give all, even, odd, or numbers and ranges "
                f"joined by a slash, such as 0-{count // 2}/{count - 1}."
            )
        found.update(these)
    return found
