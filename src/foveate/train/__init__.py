"""Train a small model with any token mixer on a task, and say how well it does."""

from foveate.train.build import Sizes, build
from foveate.train.loop import Report, Settings, fit
from foveate.train.run import Trained, train

__all__ = ["Report", "Settings", "Sizes", "Trained", "build", "fit", "train"]
