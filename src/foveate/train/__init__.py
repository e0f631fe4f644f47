"""Train a small model with any token mixer on a task, and say how well it does."""

from foveate.train.build import Sizes, build
from foveate.train.loop import Report, Settings, fit

__all__ = ["Report", "Settings", "Sizes", "build", "fit"]
