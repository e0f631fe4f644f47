"""The room of token mixers: how tokens exchange information. One file a technique."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):  # a technique registers when its file is imported
    importlib.import_module(f"{__name__}.{_module.name}")
