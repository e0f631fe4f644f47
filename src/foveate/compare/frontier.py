"""From cells to something to decide by: a row for each recipe, the rows no other beats, and advice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foveate.measure.bootstrap import perplexity_ratio

HIGHER_IS_BETTER = frozenset(
    {
        "passkey",
        "decode_speedup",
        "prefill_speedup",
        "decode_tokens_per_second",
        "prefill_tokens_per_second",
    }
)

QUALITIES = ("perplexity", "passkey", "copy_surprisal_ratio")


@dataclass(frozen=True)
class Figure:
    """A measured value and the ends of its interval; both ends are None where there is no interval.

    Example:
        >>> Figure(12.3, 11.9, 12.8).covers(12.0)
        True
    """

    value: float
    low: float | None = None
    high: float | None = None

    def covers(self, value: float) -> bool:
        """Whether `value` lies inside the interval, so that no difference from it may be claimed."""
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        return low <= value <= high


@dataclass(frozen=True)
class Change:
    """A figure against that of `full`: the ratio of perplexities, the difference of anything else.

    `high` is the upper end of the paired interval where there is one, otherwise the value.
    `real` is False where the difference lies inside its interval.

    Example:
        >>> Change(1.02, high=1.03, real=True).value
        1.02
    """

    value: float
    high: float
    real: bool


@dataclass(frozen=True)
class Row:
    """All that was measured of one recipe on one model.

    `figures` and `changes` map a task to its metrics, `failures` a task to the reason it failed.

    Example:
        >>> row = Row("tiny", "h2o:keep=0.5", {"passkey": {"passkey": Figure(1.0)}})
        >>> row.figure("passkey").value
        1.0
    """

    model: str
    recipe: str
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    changes: dict[str, dict[str, Change]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def figure(self, metric: str, task: str | None = None) -> Figure | None:
        """The metric as `task` measured it; without a task, as the first task that has it did."""
        tasks = self.figures if task is None else [task]
        return next((self.figures[t][metric] for t in tasks if metric in self.figures.get(t, {})), None)

    def cost(self, metric: str, task: str | None) -> Figure | None:
        """The metric as `task` measured it, or as any other task did: speed has a task of its own."""
        return self.figure(metric, task) or self.figure(metric)


def summarise(cells: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row for each (model, recipe), in the cells' order, with the metrics of all its tasks.

    Args:
        cells: finished cells, as in a run's `cells/` folder. A perplexity is held against that of `full`
            block by block where both have the artifact `blocks`, or as the metric `perplexity_ratio` says.

    Returns:
        Rows. `changes` has the tasks for which the model's `full` was measured too.

    Example:
        >>> cell = {"model": "tiny", "task": "perplexity", "status": "ok"}
        >>> rows = summarise([
        ...     cell | {"recipe": "full", "metrics": {"perplexity": {"value": 10, "low": 9, "high": 11}}},
        ...     cell | {"recipe": "window", "metrics": {"perplexity": {"value": 20, "low": 18, "high": 22}}},
        ... ])
        >>> rows[1].changes["perplexity"]["perplexity"]
        Change(value=2.0, high=2.0, real=True)
    """
    cells = list(cells)
    fulls = {(c["model"], c["task"]): c for c in cells if c["recipe"] == "full" and c["status"] == "ok"}
    rows: dict[tuple[str, str], Row] = {}
    for cell in cells:
        model, recipe, task = cell["model"], cell["recipe"], cell["task"]
        row = rows.setdefault((model, recipe), Row(model, recipe))
        if cell["status"] == "failed":
            row.failures[task] = cell["reason"]
            continue
        row.figures[task] = {name: Figure(**metric) for name, metric in cell["metrics"].items()}
        if full := fulls.get((model, task)):
            shared = [name for name in QUALITIES if name in cell["metrics"] and name in full["metrics"]]
            row.changes[task] = {name: _change(cell, full, name) for name in shared}
    return list(rows.values())


def _change(cell: Mapping[str, Any], full: Mapping[str, Any], metric: str) -> Change:
    figure, reference = Figure(**cell["metrics"][metric]), full["metrics"][metric]["value"]
    if metric != "perplexity":
        value = figure.value - reference
        return Change(value, value, not figure.covers(reference))
    if paired := _paired_ratio(cell, full):
        high = paired.value if paired.high is None else paired.high
        return Change(paired.value, high, not paired.covers(1))
    value = figure.value / reference
    return Change(value, value, not figure.covers(reference))


def _paired_ratio(cell: Mapping[str, Any], full: Mapping[str, Any]) -> Figure | None:
    if given := cell["metrics"].get("perplexity_ratio"):
        return Figure(**given)
    mine, theirs = (each.get("artifacts", {}).get("blocks") for each in (cell, full))
    if not mine or not theirs or mine["tokens"] != theirs["tokens"]:
        return None
    ratio = perplexity_ratio(mine["nll"], theirs["nll"], mine["tokens"])
    return Figure(ratio.value, ratio.low, ratio.high)


def frontier(rows: Sequence[Row], cost: str, quality: str, task: str | None = None) -> list[Row]:
    """The rows that no other row beats: at most the cost and at least the quality, and better in one of them.

    Args:
        rows: rows of one model. Those without both figures are left out.
        cost: a metric such as `cache_fraction` or `decode_speedup`; taken from `task` where it has it.
        quality: a metric such as `perplexity` or `passkey`.
        task: whose `quality` counts; the first task's that has it when None.

    Returns:
        Rows from the best to the worst cost.

    Example:
        >>> def row(recipe, cache, score):
        ...     return Row("tiny", recipe, {"t": {"cache_fraction": Figure(cache), "passkey": Figure(score)}})
        >>> rows = [row("full", 1.0, 1.0), row("window", 0.5, 0.2), row("h2o", 0.4, 0.9)]
        >>> [row.recipe for row in frontier(rows, "cache_fraction", "passkey")]
        ['h2o', 'full']
    """

    def loss(metric: str, figure: Figure) -> float:
        return -figure.value if metric in HIGHER_IS_BETTER else figure.value

    points = []
    for row in rows:
        spent, gained = row.cost(cost, task), row.figure(quality, task)
        if spent and gained:
            points.append((loss(cost, spent), loss(quality, gained), row))
    kept = [
        (x, y, row) for x, y, row in points if not any(a <= x and b <= y and (a, b) != (x, y) for a, b, _ in points)
    ]
    return [row for *_, row in sorted(kept, key=lambda point: point[:2])]


def advice(cells: Iterable[Mapping[str, Any]], tolerance: float = 0.01) -> str:
    """One sentence: the cheapest recipe that keeps the quality of `full`, or the nearest where none does.

    A recipe keeps it when its perplexity over that of `full` (the paired ratio's upper end, where there is
    one) is at most 1 + tolerance on every text, and no passkey score is lower beyond its interval.
    Cheapest is the smallest share of the cache, then the fastest decoding, then the lower perplexity.

    Example:
        >>> advice([])
        'no advice: nothing was measured.'
    """
    rows = summarise(cells)
    models = list(dict.fromkeys(row.model for row in rows))
    if not models:
        return "no advice: nothing was measured."
    sentences = [_advice([row for row in rows if row.model == model], tolerance) for model in models]
    if len(models) == 1:
        return sentences[0]
    return "; ".join(f"for {model}, {said[:-1]}" for model, said in zip(models, sentences, strict=True)) + "."


def _advice(rows: list[Row], tolerance: float) -> str:
    within = f"within {100 * tolerance:g}% of the full model"
    full = next((row for row in rows if row.recipe == "full"), None)
    if full is None:
        return "no advice: `full` is not in this run, so there is nothing to hold the recipes against."
    texts = [task for task, figures in full.figures.items() if "perplexity" in figures]
    passkeys = [task for task, figures in full.figures.items() if "passkey" in figures]
    if not texts:
        return "no advice: the perplexity of `full` was not measured, so no recipe can be held against it."

    def ratio(row: Row) -> Change:
        return max((row.changes[task]["perplexity"] for task in texts), key=lambda change: change.high)

    def lost(row: Row) -> list[str]:
        changes = {task: row.changes[task]["passkey"] for task in passkeys}
        return [task for task, change in changes.items() if change.real and change.value < 0]

    def cost(row: Row) -> tuple[float, float, float]:
        cache, speed = row.cost("cache_fraction", texts[0]), row.figure("decode_speedup")
        share = round(cache.value, 2) if cache else 1.0  # what is shown as the same percentage is the same
        return share, -speed.value if speed and not speed.covers(1) else -1.0, ratio(row).value

    measured = [row for row in rows if row is not full and all(task in row.changes for task in texts + passkeys)]
    if not measured:
        return "no advice: no recipe beside `full` came through all the tasks that judge quality."
    kept = [row for row in measured if ratio(row).high <= 1 + tolerance and not lost(row)]
    saving = [row for row in kept if cost(row)[0] < 1 or cost(row)[1] < -1]
    if saving:
        return f"{within}: {_terms(min(saving, key=cost), texts[0])}."
    if kept:
        names = ", ".join(row.recipe for row in kept)
        return f"{within}, but saving neither cache nor decoding time as far as measured: {names}."
    nearest = min(measured, key=lambda row: (len(lost(row)), ratio(row).high))
    shortfall = _shortfall(nearest, full, ratio(nearest), lost(nearest), tolerance)
    return f"nothing measured stays {within}; nearest is {_terms(nearest, texts[0])}: {shortfall}."


def _terms(row: Row, text: str) -> str:
    """The recipe and what it saves, as far as that was measured."""
    terms = row.recipe
    cache, speed = row.cost("cache_fraction", text), row.figure("decode_speedup")
    if cache:
        terms += f" at {_percent(cache.value)} of the cache"
    if speed and speed.covers(1):
        terms += ", no measurable difference in decoding speed"
    elif speed and speed.value > 1:
        terms += f", {speed.value:.3g}x faster decoding"
    elif speed:
        terms += f", {1 / speed.value:.3g}x slower decoding"
    return terms


def _shortfall(row: Row, full: Row, ratio: Change, lost: list[str], tolerance: float) -> str:
    """What keeps the recipe from being within tolerance."""
    parts = []
    if ratio.real and ratio.value >= 2:
        parts.append(f"{ratio.value:.3g} times the perplexity of full")
    elif ratio.real and ratio.high > 1 + tolerance:
        parts.append(f"perplexity {_percent(ratio.value - 1)} higher")
    elif ratio.high > 1 + tolerance:
        reach = _percent(ratio.high - 1)
        parts.append(f"its perplexity can't be told from that of full, but {reach} higher isn't ruled out")
    for task in lost:
        mine, theirs = row.figures[task]["passkey"], full.figures[task]["passkey"]
        parts.append(f"{_percent(mine.value)} of the passkeys answered against {_percent(theirs.value)}")
    return ", ".join(parts)


def _percent(fraction: float) -> str:
    """A share in percent, with a decimal below 10%."""
    return f"{100 * fraction:.{0 if abs(fraction) >= 0.0995 else 1}f}%".replace(".0%", "%")
