"""Running cells on a model in this process; what can go wrong with one is its result."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import set_seed

from foveate.compare.grid import Cell, versions, weights_digest
from foveate.data.text import Text
from foveate.errors import FoveateError
from foveate.methods import Recipe
from foveate.models.load import load
from foveate.tasks import TASKS, Bench
from foveate.tasks.base import Progress

Result = dict[str, Any]
"""What running a cell gave: `status`, `seconds`, `metrics`, `artifacts`; where it failed, `reason`, maybe
`traceback`."""


class Watcher(Protocol):
    """Who is told what happens to the cells."""

    def started(self, cell: Cell) -> None: ...
    def progressed(self, cell: Cell, fraction: float) -> None: ...
    def finished(self, cell: Cell, result: Result) -> None: ...


class Runs(Protocol):
    """Who runs cells in this process."""

    def run(self, cell: Cell, progress: Progress) -> Result: ...


class Place(Hashable, Protocol):
    """From where a process, here or on another machine, gets who runs cells; it is sent there.

    Attributes:
        device: as `foveate.load` takes it: whether a GPU is needed.
    """

    @property
    def device(self) -> str: ...
    def seat(self) -> Runs: ...
    def cost(self, cell: Cell) -> float: ...


# ---- one cell ------------------------------------------------------------------------------------------


def run_cell(bench: Bench, cell: Cell, progress: Progress) -> Result:
    """Measure one cell. Whatever goes wrong is its result: only what stops the whole run is raised."""
    began = time.perf_counter()
    try:
        set_seed(cell.setting["seed"])
        task, recipe = TASKS.parse(cell.task), Recipe.of(cell.recipe)
        outcome = task.measure(dataclasses.replace(bench, progress=progress), recipe)
        for name, metric in outcome.metrics.items():
            if not math.isfinite(metric.value):
                raise FoveateError(
                    f"{name} came out as {metric.value}: the model's numbers overflow under this recipe. "
                    "Try another dtype."
                )
        return {
            "status": "ok",
            "seconds": time.perf_counter() - began,
            "metrics": {name: metric.to_json() for name, metric in outcome.metrics.items()},
            "artifacts": _plain(outcome.artifacts),
        }
    except Exception as error:
        return failed(error, began)


def failed(error: Exception, began: float) -> Result:
    """The result of a cell, started at `time.perf_counter() == began`, that ended in `error`."""
    result: Result = {
        "status": "failed",
        "reason": str(error),
        "seconds": time.perf_counter() - began,
        "metrics": {},
        "artifacts": {},
    }
    if not isinstance(error, FoveateError):  # nobody foresaw it
        result["reason"] = _reason(error)
        result["traceback"] = "".join(traceback.format_exception(error))
    return result


def _reason(error: Exception) -> str:
    """What an error says and the innermost place, in a line."""
    said = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in said:
        return f"out of memory: {said}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {said} ({Path(frame.filename).name}:{frame.lineno})"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- one model -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """How a process, here or on another machine, gets the model that the run is about.

    Attributes:
        model, dtype, device: as `foveate.load` takes them.
        text: sent along, because a file may not be there on another machine.
        weights, versions: what must be the same there; None in the process that finds them out.
    """

    model: str
    dtype: str
    device: str
    text: Text
    weights: str | None = None
    versions: dict[str, str] | None = field(default=None, hash=False)

    def seat(self) -> Seat:
        """The model, to run cells on."""
        return Seat(self.open)

    def cost(self, cell: Cell) -> float:
        """How much work a cell is, in `Task.cost()`'s unit."""
        return TASKS.parse(cell.task).cost()

    def open(self) -> Bench:
        if self.versions is not None and versions() != self.versions:
            raise FoveateError(f"the run was started with {self.versions}, but here is {versions()}: install the same.")
        model, tokenizer = load(self.model, dtype=self.dtype, device=self.device)
        if self.weights is not None and weights_digest(model) != self.weights:
            raise FoveateError(
                f"{self.model} is another model here than where the run started: give all machines the same."
            )
        return Bench(model, tokenizer, self.text)


class Seat:
    """A model that cells run on, opened anew after a cell that may have left it in any state.

    Args:
        open: gives the bench; called again after a failure that nobody foresaw.

    Example:
        >>> from foveate.data.text import load_text
        >>> from foveate.models.tiny import tiny, tiny_tokenizer
        >>> seat = Seat(lambda: Bench(tiny("llama"), tiny_tokenizer(), load_text("prose")))
        >>> cell = Cell("tiny", "full", "perplexity:tokens=128,window=64", {"seed": 0})
        >>> seat.run(cell, lambda fraction: None)["status"]
        'ok'
    """

    def __init__(self, open: Callable[[], Bench]):
        self._open = open
        self._bench: Bench | None = None

    def bench(self) -> Bench:
        self._bench = self._bench or self._open()
        return self._bench

    def run(self, cell: Cell, progress: Progress) -> Result:
        began = time.perf_counter()
        try:
            self.bench()
        except Exception as error:
            return failed(error, began)
        result = run_cell(self.bench(), cell, progress)
        if "traceback" in result:
            self._bench = None
            gc.collect()
            torch.cuda.empty_cache()
        return result


def in_this_process(cells: Sequence[Cell], seat: Runs, watcher: Watcher) -> None:
    """Run cells one after the other."""
    for cell in cells:
        watcher.started(cell)
        watcher.finished(cell, seat.run(cell, functools.partial(watcher.progressed, cell)))
