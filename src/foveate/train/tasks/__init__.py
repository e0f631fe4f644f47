"""Tasks to learn. One file each."""

import importlib
import pkgutil

from foveate.train.tasks.base import TRAIN_TASKS, Batch, Split, TrainTask, train_task

for _module in pkgutil.iter_modules(__path__):  # a task registers when its file is imported
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["TRAIN_TASKS", "Batch", "Split", "TrainTask", "train_task"]
