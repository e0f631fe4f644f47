"""Ways to stack layers. One file each."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):  # a technique registers when its file is imported
    importlib.import_module(f"{__name__}.{_module.name}")
