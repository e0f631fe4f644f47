"""The room of depth: which layers run, for which token. One file a technique."""

import importlib
import pkgutil

from foveate.depth.base import DepthPlan

for _module in pkgutil.iter_modules(__path__):  # a technique registers when its file is imported
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["DepthPlan"]
