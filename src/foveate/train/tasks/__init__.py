"""Tasks to learn. One file each."""

from foveate.train.tasks import dag_search, induction, listops, lm, mqar, regression, selective_copying
from foveate.train.tasks.base import TRAIN_TASKS, Batch, Split, TrainTask, train_task

__all__ = ["TRAIN_TASKS", "Batch", "Split", "TrainTask", "train_task"]
