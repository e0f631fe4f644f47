"""Compare token mixers: each trained on the same tasks with the same settings, on the spot; cells as of any grid."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from foveate.backbone import MIXERS, Backbone
from foveate.compare import grid
from foveate.compare.grid import Cell
from foveate.compare.runner import run
from foveate.compare.seat import Result, failed
from foveate.compare.store import RunFolder
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, median
from foveate.measure.clock import timed
from foveate.models.load import device_of
from foveate.specs import nearest, split_outside, split_specs
from foveate.tasks.base import Progress
from foveate.train import Settings, Sizes, build, fit
from foveate.train.show import Show
from foveate.train.tasks import TRAIN_TASKS, TrainTask
from foveate.train.trial import held_bytes, over_seeds

LONGEST = 4096
"""Tokens up to which the state's size is measured."""


@dataclass(frozen=True)
class Contest:
    """A comparison of mixers that has a name: what it is for, mixers, tasks, sizes, settings, learning rates."""

    about: str
    mixers: tuple[str, ...]
    tasks: tuple[str, ...]
    sizes: Sizes
    settings: Settings
    lrs: tuple[float, ...]


CONTESTS = {
    "recall": Contest(
        about="recall against the size of the state, small: under five minutes on two CPU cores",
        mixers=(
            "softmax",
            "softmax:window=48",
            "linear",
            "based:feature=2,window=8",
            "based:feature=2,window=32",
            "based:feature=4,window=8",
            "based:feature=8,window=8",
        ),
        tasks=("mqar:pairs=16,length=128,vocab=256",),
        sizes=Sizes(width=64, layers=2, heads=2, conv=3),
        settings=Settings(steps=600, batch=32, until=0.99),
        lrs=(3e-3,),
    ),
    "frontier": Contest(
        about="the same with longer texts, more mixers and sizes: some ten minutes on a large GPU with `--workers 8`",
        mixers=(
            "softmax",
            *(f"softmax:window={window}" for window in (32, 128)),
            "linear",
            "lightning",
            "gated-linear",
            *(f"mamba2:state={state}" for state in (16, 64)),
            "hybrid",
            *(f"based:feature={feature},window=16" for feature in (4, 8, 16, 24)),
            *(f"based:feature=8,window={window}" for window in (64, 128)),
        ),
        tasks=("mqar:pairs=16,length=128,vocab=512", "mqar:pairs=64,length=512,vocab=512"),
        sizes=Sizes(width=128, layers=2, heads=2, conv=3),
        settings=Settings(steps=2000, batch=64, until=0.99),
        lrs=(2e-3,),
    ),
}


@dataclass(frozen=True)
class MixerComparison:
    """What a run measured.

    Attributes:
        cells: the finished cells: dictionaries as of `Comparison`, the mixer under `recipe`.
        out: the run folder, or None.
    """

    cells: Sequence[dict[str, Any]]
    out: Path | None

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The cells that failed, each with its `reason`."""
        return [cell for cell in self.cells if cell["status"] == "failed"]

    def rows(self) -> list[Row]:
        """A row for each mixer and task, its figures over all seeds."""
        return rows_of(self.cells)

    def table(self) -> Group:
        """One table a task, for `rich.print`."""
        return Group(*(self._table(task) for task in dict.fromkeys(row.task for row in self.rows())))

    def _table(self, task: str) -> Table:
        shown = Table(box=SIMPLE_HEAD, title=Text(task), title_justify="left")
        shown.add_column("mixer", overflow="fold")
        for name in ("quality", "state", "parameters", "training", "decoding"):
            shown.add_column(name, justify="right", no_wrap=name != "quality")
        for row in self.rows():
            if row.task == task:
                shown.add_row(Text(row.mixer.replace("+", "\n+")), *row.texts())
        return shown

    def advice(self) -> str:
        """For each task a sentence: what does best, and with how little state one comes near."""
        return " ".join(advice_of(self.rows())) or "nothing was measured."

    def report(self, path: str | Path) -> Path:
        """Write the page, one HTML file that opens offline, and say where."""
        from foveate.compare.mixers_report import write

        return write(self.cells, Path(path))


def compare_mixers(
    mixers: Iterable[str] | None = None,
    tasks: Iterable[str | TrainTask] | None = None,
    *,
    contest: str = "recall",
    sizes: Sizes | None = None,
    settings: Settings | None = None,
    lrs: Sequence[float] | None = None,
    seeds: Sequence[int] = (0,),
    test: int = 512,
    out: str | Path | None = None,
    device: str = "auto",
    workers: int = 0,
    ray: str | None = None,
    show: bool = True,
) -> MixerComparison:
    """Train every mixer on every task, once a seed, and measure it; go on where an earlier run was stopped.

    Every cell has the same sizes, data and steps. Where several learning rates are given, the one that does best on
    validation examples counts, and test examples judge it.

    Args:
        mixers: texts, such as `"based:window=16"`; `a+b` are layers in turns. By default the contest's.
        tasks: texts of training tasks; by default the contest's.
        contest: a name in `CONTESTS`, for all that is not given.
        sizes, settings: of the models (their `mixer` is not used) and their training.
        lrs: learning rates to try.
        seeds: of weights and data; with several, intervals are over them.
        test: examples that a model is judged by.
        out: the run folder, as of `compare`. Without it nothing is written.
        device: `cpu`, `cuda`, ... or `auto`.
        workers: child processes; 0: run here. Cells that run side by side slow one another, so that speeds are
            measured only without.
        ray: address of a Ray cluster: "local", "auto" or "host:port".
        show: tell on the standard error how far the run is.

    Raises:
        FoveateError: something asked for can't be done; nothing has been run or written then.
        Interrupted: Ctrl-C or SIGTERM (a KeyboardInterrupt); what is finished is in `out`.

    Example:
        >>> from foveate.compare.mixers import compare_mixers
        >>> from foveate.train import Settings, Sizes
        >>> got = compare_mixers(["softmax", "linear"], ["mqar:pairs=1,length=8,vocab=8"], sizes=Sizes(width=32),
        ...     settings=Settings(steps=5, batch=8), test=32, device="cpu", show=False)
        >>> [(row.mixer, row.state_bytes) for row in got.rows()]
        [('softmax', 4112), ('linear', 2304)]
    """
    if contest not in CONTESTS:
        raise FoveateError(f"there is no contest called {contest!r}: {nearest(contest, CONTESTS)}")
    chosen = CONTESTS[contest]
    wanted = [_same(each) for each in (chosen.mixers if mixers is None else mixers)]
    asked = [
        each if isinstance(each, TrainTask) else TRAIN_TASKS.parse(each)
        for each in (chosen.tasks if tasks is None else tasks)
    ]
    if not wanted or not asked or not seeds:
        raise FoveateError("a comparison needs at least one mixer, one task and one seed.")
    if workers < 0 or (workers and ray):
        raise FoveateError("workers must be 0 or more, and exclude ray: give one of them.")
    sizes, settings = sizes or chosen.sizes, settings or chosen.settings
    tried = tuple(lrs or (chosen.lrs if settings is chosen.settings else (settings.lr,)))
    where = device_of(device)
    for task in asked:
        task.check()
        for name in wanted:
            build(task, replace(sizes, mixer=name))  # or it says what does not fit
    setting = {
        "sizes": {key: value for key, value in asdict(sizes).items() if key != "mixer"},
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("seed", "lr")},
        "lrs": list(tried),
        "test": test,
        "device": where.type,
        "speeds": not workers and ray is None,
    }
    arguments = {"mixers": wanted, "tasks": [str(task) for task in asked], "seeds": list(seeds)} | setting
    cells = [
        Cell(_named(sizes), name, str(task), {**setting, "seed": seed, **grid.versions()})
        for seed in seeds
        for task in asked
        for name in wanted
    ]
    with contextlib.ExitStack() as stack:
        place = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = stack.enter_context(RunFolder(place, json.loads(json.dumps(arguments))))
        folder.plan(cells)
        if show and (finished := len(cells) - len(folder.missing())):
            print(f"foveate: {finished} of {len(cells)} cells are finished already.", file=sys.stderr)
        try:
            run(folder, TrainPlace(device if device != "auto" else where.type), workers=workers, ray=ray, show=show)
        finally:
            found = MixerComparison(folder.records(), None if out is None else place)
            if out is not None and found.cells:
                found.report(place / "report.html")
    return found


def _same(text: str) -> str:
    """A mixer's text as its fields would write it, so that equal ones are one cell."""
    return "+".join(MIXERS.parse(each).to_text() for each in split_outside(text, "+"))


def _named(sizes: Sizes) -> str:
    defaults = Sizes()
    names = [name for name in ("norm", "channel", "stack", "conv") if getattr(sizes, name) != getattr(defaults, name)]
    return ", ".join([f"{sizes.layers} layers of {sizes.width}", *(f"{name}={getattr(sizes, name)}" for name in names)])


# ---- one cell -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainPlace:
    """Where models are trained: all that a process has to know is the device."""

    device: str

    def seat(self) -> TrainSeat:
        return TrainSeat(torch.device(self.device))

    def cost(self, cell: Cell) -> float:
        return TRAIN_TASKS.parse(cell.task).tokens


@dataclass(frozen=True)
class TrainSeat:
    """Trains and measures one cell's model; what can go wrong with it is its result."""

    device: torch.device

    def run(self, cell: Cell, progress: Progress) -> Result:
        began = time.perf_counter()
        try:
            metrics, artifacts = measured(cell, self.device, progress)
        except Exception as error:
            return failed(error, began)
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return {
            "status": "ok",
            "seconds": time.perf_counter() - began,
            "metrics": {name: metric.to_json() for name, metric in metrics.items()},
            "artifacts": artifacts,
        }


def measured(cell: Cell, device: torch.device, progress: Progress) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Train a cell's model with each learning rate, and measure the best: figures, and what charts are made of."""
    task, setting = TRAIN_TASKS.parse(cell.task), cell.setting
    sizes = Sizes(mixer=cell.recipe, **setting["sizes"])
    tried: list[tuple[float, float, Backbone, Any]] = []
    for number, lr in enumerate(setting["lrs"]):
        settings = Settings(**setting["settings"], seed=setting["seed"], lr=lr)
        model = build(task, sizes, seed=setting["seed"]).to(device)  # type: ignore[arg-type]
        show = Show(lambda done, number=number: progress((number + 0.95 * done) / len(setting["lrs"])))  # type: ignore[misc]
        report = fit(model, task, settings, show=show)
        value = task.judge(model, split="validation", count=256)[task.better].value
        tried.append((value if task.higher else -value, lr, model, report))
    _, lr, model, report = max(tried, key=lambda each: each[0])
    metrics = task.judge(model, count=setting["test"])
    metrics["parameters"] = Metric.exact(model.num_parameters())
    artifacts: dict[str, Any] = {"lr": lr, "steps": report.steps, "losses": _thinned(report.losses)}
    if all(mixer.causal for mixer in model.config.mixers):
        lengths = [n for n in (task.tokens * 4**i for i in range(6)) if n <= LONGEST] or [task.tokens]
        held = [held_bytes(model, n) for n in lengths]
        metrics["state_bytes"] = Metric.exact(held[0])
        artifacts["memory"] = {"x": lengths, "y": held}
    if setting["speeds"]:
        metrics["train_tokens_per_second"] = Metric.exact(report.tokens_per_second)
        if "state_bytes" in metrics and task.vocabulary:
            metrics["decode_tokens_per_second"] = decode_speed(model, task.tokens)
    progress(1.0)
    return metrics, artifacts


@torch.no_grad()
def decode_speed(model: Backbone, tokens: int, repeats: int = 15) -> Metric:
    """Tokens a second of one text, step by step, after `tokens` of it."""
    ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    cache = model.hidden(ids, use_cache=True).past_key_values
    times = []
    for turn in range(repeats + 3):
        seconds, _ = timed(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True), model.device)
        if turn >= 3:  # warm
            times.append(1 / seconds)
    return median(times)


def _thinned(losses: list[float], points: int = 100) -> list[list[float]]:
    width = max(1, -(-len(losses) // points))
    parts = [losses[at : at + width] for at in range(0, len(losses), width)]
    return [[min(len(losses), (i + 1) * width), sum(part) / len(part)] for i, part in enumerate(parts)]


# ---- from cells to rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One mixer on one task, over all seeds.

    Attributes:
        better: the metric to look at, `accuracy` or `loss`; `higher`, whether more of it is better.
        quality: its figure: one seed's, with the interval over examples, or the mean over seeds, with theirs.
        state_bytes: held of a text of the task's length; None where the mixer looks both ways.
        train_tokens_per_second, decode_tokens_per_second: None where not measured.
        memory: lengths and bytes held; losses: (step, loss) of the first seed.
        reason: why it failed, where all seeds did; finished: how many seeds of how many did not fail.
    """

    mixer: str
    task: str
    better: str
    higher: bool
    quality: Metric | None
    parameters: int = 0
    state_bytes: int | None = None
    train_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    memory: Mapping[str, list[int]] | None = None
    losses: Sequence[Sequence[float]] = ()
    reason: str = ""
    finished: tuple[int, int] = (1, 1)

    def _missing(self) -> str:
        done, of = self.finished
        return "" if done == of else f" {done} of {of} seeds"

    def texts(self) -> list[str]:
        """Quality, state, parameters, speeds, as people read them."""
        if self.quality is None:
            return ["failed", *["-"] * 4]
        percent = self.better == "accuracy"
        low, value, high = (
            f"{100 * x:.1f}" if percent else f"{x:.3f}"
            for x in (self.quality.low, self.quality.value, self.quality.high)
        )
        train, decode = self.train_tokens_per_second, self.decode_tokens_per_second
        return [
            f"{value}{'%' if percent else ''} [{low}, {high}]{self._missing()}",
            "both ways" if self.state_bytes is None else f"{self.state_bytes:,} B",
            f"{self.parameters:,}",
            "-" if train is None else f"{train:,.0f}/s",
            "-" if decode is None else f"{decode:,.0f}/s",
        ]


def rows_of(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows in the cells' order."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["recipe"], cell["task"]), []).append(cell)
    rows = []
    for (name, text), group in groups.items():
        task = TRAIN_TASKS.parse(text)
        done = [cell for cell in group if cell["status"] == "ok"]
        if not done:
            rows.append(Row(name, text, task.better, task.higher, None, reason=group[0]["reason"]))
            continue
        each = [cell["metrics"][task.better] for cell in done]
        quality = Metric(**each[0]) if len(each) == 1 else over_seeds([one["value"] for one in each])

        def middle(metric: str, done: Any = done) -> float | None:
            values = [cell["metrics"][metric]["value"] for cell in done if metric in cell["metrics"]]
            return sum(values) / len(values) if values else None

        state = middle("state_bytes")
        rows.append(
            Row(
                name,
                text,
                task.better,
                task.higher,
                quality,
                int(middle("parameters") or 0),
                None if state is None else int(state),
                middle("train_tokens_per_second"),
                middle("decode_tokens_per_second"),
                done[0]["artifacts"].get("memory"),
                done[0]["artifacts"]["losses"],
                finished=(len(done), len(group)),
            )
        )
    return rows


def advice_of(rows: Sequence[Row]) -> list[str]:
    """For each task the best mixer, and the smallest state whose quality is within 2 points (a loss: 2%) of it.

    Example:
        >>> good = Row("softmax", "mqar", "accuracy", True, Metric(0.99, 0.98, 1.0), 10, 4096)
        >>> small = Row("based", "mqar", "accuracy", True, Metric(0.98, 0.97, 0.99), 10, 1024)
        >>> advice_of([good, small])[0]
        'mqar: softmax does best (99.0%) with 4,096 bytes of state; based comes near (98.0%) with 1,024.'
    """
    said = []
    for task in dict.fromkeys(row.task for row in rows):
        there = [row for row in rows if row.task == task and row.quality is not None]
        if not there:
            continue

        def value(row: Row) -> float:
            assert row.quality is not None
            return row.quality.value if row.higher else -row.quality.value

        def text(row: Row) -> str:
            return row.texts()[0].partition(" ")[0]

        best = max(there, key=lambda row: (value(row), -(row.state_bytes or 0)))
        room = 0.02 if best.better == "accuracy" else 0.02 * abs(value(best))
        near = [row for row in there if row.state_bytes is not None and value(row) >= value(best) - room]
        line = f"{task}: {best.mixer} does best ({text(best)})"
        if best.state_bytes is not None:
            line += f" with {best.state_bytes:,} bytes of state"
        least = min(near, key=lambda row: row.state_bytes or 0, default=None)
        if least is None or least is best:
            said.append(f"{line}; none with less comes near." if best.state_bytes is not None else f"{line}.")
        else:
            said.append(f"{line}; {least.mixer} comes near ({text(least)}) with {least.state_bytes:,}.")
    return said


def asked_for(
    model: str | None,
    recipes: object,
    mixers: Sequence[str],
    tasks: Sequence[str] | None,
    train: Sequence[str] | None,
    out: Path | None,
    *,
    seed: int = 0,
    others: Sequence[str] = (),
) -> dict[str, Any]:
    """What the command line asked for, as `compare_mixers` takes it.

    Args:
        mixers: specs joined by commas, or the name of a contest.
        train: `name=value` of sizes and settings joined by commas; `lr` and `seeds` may have several values, joined
            by `/`.
        seed: where `train` has no seeds.
        others: options given that mean nothing here.

    Raises:
        FoveateError: a model, recipes or other options beside mixers, a name that is neither a size nor a setting.

    Example:
        >>> asked_for(None, None, ["softmax,linear"], None, ["width=32,lr=1e-3/3e-3"], None)["lrs"]
        [0.001, 0.003]
    """
    if model is not None or recipes is not None:
        raise FoveateError("--mixers trains models of its own: give no model and no --recipes with it.")
    if others:
        raise FoveateError(f"{', '.join(others)} says nothing of models that are trained: leave it out with --mixers.")
    names = [spec for each in mixers for spec in split_specs(each)]
    contest = names[0] if len(names) == 1 and names[0] in CONTESTS else "recall"
    chosen = CONTESTS[contest]
    sizes, settings = asdict(chosen.sizes), asdict(chosen.settings)
    lrs, seeds = list(chosen.lrs), [seed]
    known = sorted(({*sizes, *settings} - {"mixer", "seed"}) | {"seeds"})
    for part in [part for each in train or () for part in split_outside(each, ",")]:
        name, equals, value = (text.strip() for text in part.partition("="))
        if not equals or name not in known:
            raise FoveateError(f"--train {part} is no size or setting: write name=value; {nearest(name, known)}")
        if name in ("lr", "seeds"):
            lrs, seeds = (
                ([_number(name, each, 0.1) for each in value.split("/")], seeds)
                if name == "lr"
                else (lrs, [_number(name, each, 0) for each in value.split("/")])
            )
            continue
        where = sizes if name in sizes else settings
        where[name] = None if value.lower() == "none" else _number(name, value, _LIKE.get(name, where[name]))
    given = bool(train)
    arguments = {
        "mixers": None if names == [contest] else names,
        "tasks": tasks,
        "contest": contest,
        "sizes": Sizes(**sizes),
        "settings": Settings(**settings),
        "lrs": lrs,
        "seeds": seeds,
    }
    plain = arguments["mixers"] is None and tasks is None and not given and seeds == [0]
    shown = f"mixers-{contest}" if plain else f"mixers-{grid.digest({k: str(v) for k, v in arguments.items()})[:6]}"
    return {**arguments, "out": out or Path("runs", shown)}


_LIKE = {"until": 0.1, "bfloat16": True}
"""What values look like where the default is None."""


def _number(name: str, text: str, like: Any) -> Any:
    """A text as the type of a value."""
    if isinstance(like, str):
        return text
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(like)(text)
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: "a whole number"}.get(type(like), "a number")
        raise FoveateError(f"--train {name}={text} can't be read: give {wanted}.") from None
