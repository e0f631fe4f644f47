"""The room of cache policies: which key-value entries stay. One file a technique."""

import importlib
import pkgutil

from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView
from foveate.cache.loop import DecodeLoop
from foveate.cache.policy_cache import PolicyCache

for _module in pkgutil.iter_modules(__path__):  # a technique registers when its file is imported
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["CachePolicy", "CacheView", "DecodeLoop", "PolicyCache"]
