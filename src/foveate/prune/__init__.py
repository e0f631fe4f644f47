"""The room of pruning: which heads, channels, sublayers, weights stay. One file a technique."""

import importlib
import pkgutil

from foveate.prune.base import Pruner

for _module in pkgutil.iter_modules(__path__):  # a technique registers when its file is imported
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Pruner"]
