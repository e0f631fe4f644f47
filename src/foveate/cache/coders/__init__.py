"""Codings: how many bits an entry takes."""

from foveate.cache.coders import groups, product, tiers
from foveate.cache.coders.base import CODINGS, Coder, Coding, coding

__all__ = ["CODINGS", "Coder", "Coding", "coding", "groups", "product", "tiers"]
