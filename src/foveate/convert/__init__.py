"""The room of conversion: a cheaper module in the place of a dear one. One file a technique."""

import importlib
import pkgutil

from foveate.convert.base import Converter

for _module in pkgutil.iter_modules(__path__):  # a technique registers when its file is imported
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Converter"]
