"""Learning rates over a run."""

from __future__ import annotations

import math

SCHEDULES = {"cosine": "down along a cosine to 0", "wsd": "level, then in a line to 0 over the last fifth"}


def rate(done: float, warmup: float, schedule: str) -> float:
    """The learning rate as a fraction of the highest, at a fraction of the run.

    Example:
        >>> from foveate.train.schedule import rate
        >>> [rate(done, 0.1, "wsd") for done in (0.05, 0.5, 0.9)]
        [0.5, 1.0, 0.5]
        >>> round(rate(0.55, 0.1, "cosine"), 3)
        0.5
    """
    if done < warmup:
        return max(done, 0.01 * warmup) / warmup  # not 0, at the very first step
    if schedule == "wsd":
        return round(min(1.0, (1 - done) / 0.2), 12)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
