"""Budgets: how the entries that a policy may hold are spread over layers and KV heads."""

from foveate.cache.budgets import adaptive, density, gates, measured, pyramid, retrieval, uniform
from foveate.cache.budgets.base import BUDGETS, EVERYTHING, Budget, allot, budget

__all__ = ["BUDGETS", "EVERYTHING", "Budget", "allot", "budget"]
__all__ += ["adaptive", "density", "gates", "measured", "pyramid", "retrieval", "uniform"]
