"""Budgets: how the entries that a policy may hold are spread over layers and KV heads."""

from foveate.cache.budgets import pyramid, uniform
from foveate.cache.budgets.base import BUDGETS, EVERYTHING, Budget, allot, budget

__all__ = ["BUDGETS", "EVERYTHING", "Budget", "allot", "budget", "pyramid", "uniform"]
