"""The room of probes: what a model's heads, layers and tokens do. One file a technique."""

import importlib
import pkgutil

from foveate.probes.base import Data, Probe, Reading, Role, probe
from foveate.probes.watch import Watch, Watcher

for _module in pkgutil.iter_modules(__path__):  # a technique registers when its file is imported
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Data", "Probe", "Reading", "Role", "Watch", "Watcher", "probe"]
