"""Search: the cheapest way down to a budget, across techniques, over steps that are measured on your own model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.models.anatomy import anatomy
from foveate.models.load import load, model_name, tokenizer_for
from foveate.models.stored import fingerprint, text_digest
from foveate.models.surgery import undone
from foveate.plans import Plan
from foveate.search.axes import RankAxis, chosen_axes
from foveate.search.goals import AXES_OF, PROMPT, TOKENS, Goal, Memory, Params, Speed, Times, measure_times
from foveate.search.judge import Judged, judge, speeds
from foveate.search.loss import Loss
from foveate.search.shown import Shown
from foveate.search.states import Live
from foveate.search.text import passages, rest
from foveate.search.walk import Journal, Taken, walk
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

__all__ = ["SearchResult", "search"]

RANKING_TOKENS = 8192
"""Tokens of calibration text, at most, that axes rank their units on."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        model: the model's name.
        layers: how many it has.
        goal: what was asked for.
        plan: which units stay.
        beside: the recipe of what is no unit, low-rank factors and the cache; "" where there is nothing.
        recipe: the whole answer as recipe text, where the plan lies in a file; else None.
        steps: the steps taken, in order: the frontier that was walked.
        start: what the goal counts in the original.
        judged: the full model, the answer, and single techniques at the same budget, on evaluation text; empty where
            that was not asked for.
        measured: of a speed goal, the measured speed-up (`value`, `low`, `high`); else None.
        ranks: (layer, `attention` or `mlp`) -> the part of its maps' parameters that stays in factors.
        out: the folder, or None.
    """

    model: str
    layers: int
    goal: Goal
    plan: Plan
    beside: str
    recipe: str | None
    steps: Sequence[Taken]
    start: float
    judged: Sequence[Judged] = ()
    measured: dict[str, float] | None = None
    ranks: Mapping[tuple[int, str], float] = field(default_factory=dict)
    out: Path | None = None
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def amount(self) -> float:
        """What the goal counts in the answer."""
        return self.steps[-1].amount if self.steps else self.start

    def over(self, rival: Judged) -> Metric | None:
        """A single technique's perplexity over the answer's, on the same chunks of text; None where it has none."""
        mine = next((row.stream for row in self.judged if row.recipe == "search"), None)
        return None if mine is None or rival.stream is None else rival.stream.over(mine)

    @property
    def singles(self) -> list[Judged]:
        """Single techniques at the same budget, best first; those that have no perplexity are last."""
        rows = [row for row in self.judged if row.recipe not in ("full", "search")]
        return sorted(rows, key=lambda row: float("inf") if row.perplexity is None else row.perplexity.value)

    def summary(self) -> str:
        """In a few sentences, for people."""
        goal, parts = self.goal, [f"{len(self.steps)} steps lead to {self.goal.words(self.amount)}"]
        parts[0] += f" ({goal.axis})" if goal.name != "speed" else " by prediction"
        if self.measured:
            figure = self.measured
            parts.append(f"measured: {figure['value']:.2f} times ({figure['low']:.2f} to {figure['high']:.2f})")
        rows = {row.recipe: row.perplexity for row in self.judged}
        full, mine = rows.get("full"), rows.get("search")
        if full is not None and mine is not None:
            parts.append(f"perplexity on evaluation text is {mine.value:.4g}, from {full.value:.4g}")
        best = self.singles[0] if self.singles else None
        ratio = None if best is None else self.over(best)
        if best is not None and ratio is not None and best.perplexity is not None:
            said = "it beats every single technique tried at this budget; the best of them is"
            if ratio.high < 1:
                said = "it does not beat every single technique: better at this budget is"
            elif ratio.low <= 1:
                said = "it can't be told apart from the best single technique at this budget,"
            parts.append(f"{said} {best.recipe}, with {best.perplexity.value:.4g}")
        return ". ".join(part[0].upper() + part[1:] for part in parts) + "."

    def table(self) -> Table:
        """The verdict on evaluation text, for `rich.print`."""
        table = Table("recipe", self.goal.axis, "perplexity", "over the search's", box=SIMPLE_HEAD)
        rows = [row for row in self.judged if row.recipe in ("full", "search")] + self.singles
        for row in rows:
            figure, ratio = row.perplexity, self.over(row)
            if figure is None or ratio is None:
                table.add_row(row.recipe, self.goal.words(row.amount), "-", row.note)
            else:
                table.add_row(
                    row.recipe,
                    self.goal.words(row.amount),
                    f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})",
                    f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                )
        return table

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: goal, steps, verdict."""

        def row(judged: Judged) -> dict[str, Any]:
            figure, ratio = judged.perplexity, self.over(judged)
            return {
                "recipe": judged.recipe,
                "amount": judged.amount,
                "perplexity": figure and figure.to_json(),
                "over_search": ratio and ratio.to_json(),
                "note": judged.note,
            }

        return {
            "model": self.model,
            "goal": self.goal.name,
            "target": self.goal.target,
            "amount": self.amount,
            "start": self.start,
            "recipe": self.recipe,
            "setting": self.setting,
            "steps": [asdict(step) for step in self.steps],
            "judged": [row(each) for each in self.judged],
            "measured_speedup": self.measured,
        }

    def report(self, path: str | Path) -> Path:
        """Write the page, one HTML file that opens offline, and say where."""
        from foveate.search.report import write_report  # charts take a while to import

        return write_report(self, Path(path))


def search(
    model: PreTrainedModel | str | Path,
    *,
    params: float | None = None,
    speed: float | None = None,
    memory: int | str | None = None,
    axes: Iterable[str] | None = None,
    out: str | Path | None = None,
    calibration_tokens: int = 1024,
    evaluation_tokens: int = 4096,
    context: int = 2048,
    phase: str = "decode",
    text: str = "prose",
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str = "auto",
    judged: bool = True,
    show: bool = True,
) -> SearchResult:
    """Search across techniques for the least loss at a budget, over steps that are measured on the model itself.

    Starting from the original, each round takes the step (a sublayer here, a head there, some neurons, some ranks, a
    smaller cache) that adds the least KL divergence from the original's predictions, for what it saves. Steps are
    measured on calibration text only. At the end the answer, and every single technique that comes down to the same
    budget, are read on evaluation text.

    Args:
        model: what `foveate.load` takes, or a live model; it is left as it was.
        params: the share of the parameters in the decoder layers that is to stay, such as 0.8.
        speed: how many times as fast the model is to be, such as 1.5, by measured times of its parts on this machine.
        memory: bytes of weights and cache, or a size such as "4GiB". One of the three is given.
        axes: what may leave: names in `foveate.search.axes.AXES`; by default those that help the goal.
        out: a folder for `plan.json`, `recipe.txt`, `steps.jsonl`, `result.json` and `report.html`. A search that
            was stopped goes on where it was, and one with another goal uses what was measured before, as long as model,
            dtype and calibration text are the same.
        calibration_tokens: calibration text that each step is measured on.
        evaluation_tokens: evaluation text of the verdict.
        context: tokens that the cache is to hold, for `memory`.
        phase: what is to be faster, `decode` or `prefill`, for `speed`.
        text: as for `foveate.load_text`.
        tokenizer: of a live model that `foveate.load` didn't load.
        dtype, device: as for `foveate.load`.
        judged: False: leave the verdict on evaluation text out.
        show: tell on the standard error how far the search is.

    Raises:
        FoveateError: no goal or several, a goal that can't be reached, an unknown axis, `out` of another search.

    Example:
        >>> import foveate as fv
        >>> from foveate.search import search
        >>> model, tokenizer = fv.tiny("llama"), fv.tiny_tokenizer()
        >>> found = search(model, params=0.9, tokenizer=tokenizer, calibration_tokens=64, judged=False, show=False)
        >>> found.amount <= 0.9, found.steps[0].loss <= found.steps[-1].loss
        (True, True)
    """
    goals = {"params": params, "speed": speed, "memory": memory}
    asked = [name for name, value in goals.items() if value is not None]
    if len(asked) != 1:
        said = f"{len(asked)} were given ({', '.join(asked)})" if asked else "none was given"
        raise FoveateError(f"a search has one goal, and {said}: give one of params, speed and memory.")
    (name,) = asked
    chosen = chosen_axes(list(AXES_OF[name] if axes is None else axes))
    if speed is not None:
        Speed.check(speed, phase)
        if RankAxis in chosen:
            raise FoveateError("what factors take in time can't be predicted: leave rank out of a speed goal's axes.")
    if calibration_tokens < 16 or evaluation_tokens < 16:
        raise FoveateError("a search needs at least 16 tokens of calibration text, and of evaluation text.")
    title = model_name(model) if isinstance(model, PreTrainedModel) else str(model)
    if not isinstance(model, PreTrainedModel):
        model, tokenizer = load(model, dtype=dtype, device=device)
    tokenizer = tokenizer or tokenizer_for(model)
    if params is not None:
        goal: Goal = Params.of(model, params)
    elif memory is not None:
        goal = Memory.of(model, memory, context)
    source = load_text(text)
    ids = passages(model, tokenizer, source.calibration, calibration_tokens)
    others = rest(model, tokenizer, source.calibration, ids, RANKING_TOKENS)
    folder = None if out is None else _folder(Path(out))
    # What determines a measurement: a search with another goal goes on from the same ones.
    setting: dict[str, Any] = {
        "model": fingerprint(model),
        "text": text_digest(ids),
        "ranking text": text_digest(others),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    training = model.training
    model.eval()
    try:
        with Shown(show) as shown:
            journal = Journal(folder and folder / "steps.jsonl", setting)
            if speed is not None:
                times = _times(model, ids, phase, folder, shown)
                goal = Speed.of(model, speed, phase, times)
            shown.say("ranking units")
            live_axes = [axis(model, others) for axis in chosen]
            start = goal.amount(model)
            with undone(model):
                makers = [axis.factors for axis in live_axes if isinstance(axis, RankAxis)]
                live = Live(model, *makers)
                try:
                    loss = Loss(model, ids)
                    state, steps = walk(
                        live, loss, goal, live_axes, journal, lambda *now: shown.walked(goal, start, *now)
                    )
                finally:
                    live.restore()
            del loss
            words = f"search:{name}={goals[name]}"
            plan = state.plan(model, words)
            recipe = _write(folder, plan, state.beside)
            rows: list[Judged] = []
            measured = None
            if judged:
                task = Perplexity(tokens=evaluation_tokens, window=min(1024, evaluation_tokens))
                bench = Bench(model, tokenizer, source)
                task.check(bench)
                shown.say("reading evaluation text")
                rows = judge(
                    bench,
                    goal,
                    plan,
                    state.beside,
                    task,
                    lambda what: shown.say(f"reading evaluation text: {what}"),
                    calibration=None if text == "prose" else others,
                )
                if speed is not None:
                    shown.say("measuring the speed")
                    measured = speeds(bench, plan, state.beside, phase, min(PROMPT, ids.shape[1]), TOKENS)
    finally:
        model.train(training)
    setting |= {"goal": words, "axes": [axis.name for axis in chosen]}
    setting |= {"calibration tokens": ids.numel(), "evaluation tokens": evaluation_tokens, "text": text}
    result = SearchResult(
        title,
        len(anatomy(model).layers),
        goal,
        plan,
        state.beside,
        recipe,
        steps,
        start,
        rows,
        measured,
        state.ranks,
        folder,
        setting,
    )
    if folder is not None:
        _put(folder / "result.json", json.dumps(result.to_json(), indent=1) + "\n")
        result.report(folder / "report.html")
    return result


# ---- the folder -----------------------------------------------------------------------------------------------------


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FoveateError(f"the folder {out} can't be made: {error.strerror}. Give another --out.") from error
    return out


def _put(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _write(folder: Path | None, plan: Plan, beside: str) -> str | None:
    """Write the plan and the recipe; the recipe's text."""
    if folder is None:
        return None
    recipe = "+".join(filter(None, [f"plan:file={folder / 'plan.json'}", beside]))
    plan.save(folder / "plan.json")
    _put(folder / "recipe.txt", recipe + "\n")
    return recipe


def _times(model: PreTrainedModel, ids: Tensor, phase: str, folder: Path | None, shown: Shown) -> Times:
    """The times of the model's parts: those of the folder, so that a search that goes on has the same ones."""
    path = folder and folder / f"times-{phase}.json"
    if path is not None and path.exists():
        try:
            return Times(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FoveateError(f"{path} is damaged ({error}): remove it.") from error
    shown.say("timing the model's parts")
    times = measure_times(model, ids[:1, :PROMPT], phase, progress=shown.done)
    if path is not None:
        _put(path, json.dumps(asdict(times)) + "\n")
    return times
