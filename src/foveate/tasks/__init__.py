"""What "still works" means: one file a task."""

from foveate.tasks.base import TASKS, Bench, Outcome, Task, task

__all__ = ["TASKS", "Bench", "Outcome", "Task", "task"]
