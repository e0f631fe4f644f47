"""The room of steering: where attention goes, changed at inference. One file a technique."""

import importlib
import pkgutil

from foveate.steer.base import AttentionSteer, AttentionView, ResidualSteer, ResidualView, Steer

for _module in pkgutil.iter_modules(__path__):  # a technique registers when its file is imported
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["AttentionSteer", "AttentionView", "ResidualSteer", "ResidualView", "Steer"]
