"""Compare recipes on a model: a grid of cells, run safely, and what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.compare import grid
from foveate.compare.grid import PROFILES, Cell, Profile, TaskLike
from foveate.compare.runner import Interrupted, run
from foveate.compare.seat import Seat, Source
from foveate.compare.store import RunFolder
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.methods import RecipeLike
from foveate.models.load import model_name, tokenizer_for
from foveate.tasks import Bench

__all__ = ["PROFILES", "Cell", "Comparison", "Interrupted", "Profile", "compare", "default_out"]


@dataclass(frozen=True)
class Comparison:
    """What a run measured.

    Attributes:
        cells: the finished cells in the grid's order, as in the run folder's `cells/`: dictionaries with
            `model`, `recipe`, `task`, `status`, `metrics`, `setting`, `seconds`, `artifacts`, and `reason`
            where it failed.
        out: the run folder, or None.

    Example:
        >>> cell = {"model": "tiny", "recipe": "full", "task": "perplexity", "status": "failed",
        ...     "reason": "out of memory", "seconds": 1.0, "setting": {}, "metrics": {}, "artifacts": {}}
        >>> [cell["reason"] for cell in Comparison([cell], None).failed]
        ['out of memory']
    """

    cells: Sequence[dict[str, Any]]
    out: Path | None

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The cells that failed, each with its `reason`."""
        return [cell for cell in self.cells if cell["status"] == "failed"]

    def table(self) -> Table:
        """One row a recipe, one column a quality or cost; for `rich.print`."""
        from foveate.compare.table import table

        return table(self.cells)

    def advice(self) -> str:
        """One sentence: which recipe to take."""
        from foveate.compare.frontier import advice

        return advice(self.cells)

    def report(self, path: str | Path) -> Path:
        """Write the page, one HTML file that opens offline, and say where."""
        from foveate.compare.report import write_report  # charts take a while to import

        return write_report(self.cells, Path(path))


def compare(
    model: PreTrainedModel | str | Path,
    recipes: Iterable[RecipeLike] | None = None,
    tasks: Iterable[TaskLike] | None = None,
    *,
    profile: str = "quick",
    out: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str = "prose",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    workers: int = 0,
    ray: str | None = None,
    show: bool = True,
) -> Comparison:
    """Measure every recipe on every task; go on where an earlier run with the same arguments was stopped.

    Args:
        model: what `foveate.load` takes, or a live model. A live model's `dtype` and `device` are its own, and it
            can't be loaded again after a technique with a bug left it in disorder.
        recipes: texts, methods or `Recipe` objects; the profile's by default.
        tasks: texts or `Task` objects; the profile's by default.
        profile: a name in `PROFILES`.
        out: the run folder: each finished cell is kept there, with `results.jsonl` and `report.html`.
            Without it nothing is written.
        tokenizer: of a live model that `foveate.load` didn't load.
        text: what tasks read: `prose`, `code`, a file, or `hub:NAME`.
        dtype, device: as for `foveate.load`.
        seed: set before every cell.
        workers: child processes, each with a model of its own; 0: run here. A script that uses them needs
            `if __name__ == "__main__":` around its own work, as always with child processes.
        ray: address of a Ray cluster: "local", "auto" or "host:port".
        show: tell on the standard error how far the run is.

    Returns:
        The cells. Those that failed are among them, with a reason: one failure does not end the run.

    Raises:
        FoveateError: something asked for can't be done; nothing has been run or written then.
        Interrupted: Ctrl-C or SIGTERM (a KeyboardInterrupt); what is finished is in `out`.

    Example:
        >>> import foveate as fv
        >>> from foveate.compare import compare
        >>> model, tokenizer = fv.tiny("llama"), fv.tiny_tokenizer()
        >>> comparison = compare(model, ["full", "window:keep=0.5"], ["perplexity:tokens=256,window=128"],
        ...     tokenizer=tokenizer, show=False)
        >>> [(cell["recipe"], cell["status"]) for cell in comparison.cells]
        [('full', 'ok'), ('window:keep=0.5', 'ok')]
    """
    chosen = grid.profile(profile)
    wanted = grid.parse_recipes(chosen.recipes if recipes is None else recipes)
    asked = grid.parse_tasks(chosen.tasks if tasks is None else tasks)
    if workers < 0:
        raise FoveateError(f"workers={workers} can't be: give 0 to run in this process, or a number.")
    if workers and ray:
        raise FoveateError("workers and ray exclude each other: give one of them.")
    if isinstance(model, PreTrainedModel) and model.training:
        raise FoveateError("the model is in training mode, where dropout blurs all figures: call model.eval() first.")
    if isinstance(model, PreTrainedModel) and (workers or ray):
        raise FoveateError("a live model can't be sent to other processes: save it, and give its folder.")

    def say(line: str) -> None:
        if show:
            print(f"foveate: {line}", file=sys.stderr)

    name = model_name(model) if isinstance(model, PreTrainedModel) else str(model)
    recipe_texts = [recipe.to_text() for recipe in wanted]
    arguments = {
        "model": name,
        "recipes": recipe_texts,
        "tasks": [task.to_text() for task in asked],
        "text": text,
        "dtype": dtype,
        "device": device,
        "seed": seed,
    }
    if "full" not in recipe_texts:
        say("full is not among the recipes, so nothing can be held against the unchanged model.")
    with contextlib.ExitStack() as stack:
        place = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = RunFolder(place, arguments)  # before the model, which takes longer
        words = load_text(text)
        source = Source(name, dtype, device, words)
        if isinstance(model, PreTrainedModel):
            bench = Bench(model, tokenizer or tokenizer_for(model), words)
            seat = Seat(lambda: bench)
        else:
            seat = Seat(source.open)
        for task in asked:
            task.check(seat.bench())
        setting = grid.setting_of(seat.bench().model, words, seed)
        stack.enter_context(folder)
        folder.plan(grid.cells(model_name(seat.bench().model), wanted, asked, setting))
        if unused := folder.unused():
            say(f"{place} holds {unused} cells of other versions, weights or text: they are not used.")
        if finished := len(folder.cells) - len(folder.missing()):
            say(f"{finished} of {len(folder.cells)} cells are finished already.")
        here: Seat | None = seat
        if workers or ray:
            del seat  # its memory is the workers' now
            here = None
            source = dataclasses.replace(
                source,
                dtype=setting["dtype"],
                device=setting["device"] if device == "auto" else device,
                weights=setting["weights"],
                versions=grid.versions(),
            )
        try:
            run(folder, source, seat=here, workers=workers, ray=ray, show=show)
        finally:
            comparison = Comparison(folder.records(), None if out is None else place)
            if out is not None and comparison.cells:
                comparison.report(place / "report.html")
    return comparison


def default_out(
    model: str, profile: str, recipes: Sequence[str] | None = None, tasks: Sequence[str] | None = None
) -> Path:
    """Where a run is kept that was given no place: the same for the same command, so that it goes on.

    Example:
        >>> default_out("smollm2-135m", "quick").as_posix()
        'runs/smollm2-135m-quick'
    """
    grid_name = grid.digest([profile, recipes, tasks])[:6] if recipes or tasks else profile
    return Path("runs", f"{Path(model).resolve().name}-{grid_name}")
