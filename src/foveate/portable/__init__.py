"""Modules that stand in for a model's own, written so that they run where foveate is not installed.

A saved model whose shape no stock architecture has takes the files that it needs from here along, as they are. So a
file here imports torch, transformers and its neighbours (`from .parts import ...`), and nothing else.

The protocol: a portable module is an `nn.Module` with

- `__init__(self, **settings)`: JSON values only; parameters are made empty, to be filled by whoever builds it. A
  parameter `config` (no setting) is given the model's configuration where the signature has one;
- `settings`: a property, the dictionary to build it with again;
- `tie(self, model)`, where it has one: called once all modules of a model are in place, to find other modules of the
  same model by the paths in its settings. What it finds is kept out of `_modules` (in a tuple, say), so that shared
  weights are saved once;
- all that it holds is in its settings, its parameters, and its buffers (of any number type): buffers that are not
  saved (`persistent=False`) are refused, since nothing would fill them again.
"""

import importlib
import pkgutil

from torch import nn

_REGISTERED: dict[str, type[nn.Module]] = {}


def register_portable(cls: type[nn.Module]) -> None:
    """Make a portable class of another package known. Its file travels, and so does what it imports from `.`.

    Called from another file than the class's own, which must not need foveate.
    """
    _REGISTERED[cls.__name__] = cls


def portable_classes() -> dict[str, type[nn.Module]]:
    """Every portable class, by name.

    Example:
        >>> from foveate.portable import portable_classes
        >>> "NoAttention" in portable_classes()
        True
    """
    files = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return _REGISTERED | {
        name: value
        for file in files
        for name, value in vars(file).items()
        if isinstance(value, type) and hasattr(value, "settings") and value.__module__ == file.__name__
    }
