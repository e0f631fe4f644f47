"""`foveate train`: a folder in which a run is made, goes on after a stop, and ends with a model and its figures."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedModel

from foveate.backbone import Backbone
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.models.load import device_of
from foveate.models.source import quiet
from foveate.specs import nearest
from foveate.train import processes
from foveate.train.build import HEADS, Sizes, build
from foveate.train.checkpoint import unwritten
from foveate.train.loop import Report, Settings, fit
from foveate.train.show import Show, duration
from foveate.train.tasks import TRAIN_TASKS, TrainTask
from foveate.train.trial import held_bytes

WHAT = "training.json"
RESULT = "result.json"


@dataclass(frozen=True)
class Trained:
    """A model that was trained, and what is known of it.

    Attributes:
        model: in eval mode, on its device.
        task, sizes, settings: what was asked for.
        report: how training went.
        metrics: the task's, on examples that training never saw, with intervals.
        out: the folder, or None.
    """

    model: Backbone
    task: TrainTask
    sizes: Sizes
    settings: Settings
    report: Report
    metrics: dict[str, Metric]
    out: Path | None = None

    def table(self) -> Table:
        """The figures, for `rich.print`."""
        table = Table(box=SIMPLE_HEAD)
        table.add_column("figure")
        table.add_column("value", justify="right")
        for name, metric in self.metrics.items():
            table.add_row(f"{name}, unseen", f"{metric.value:.4f} [{metric.low:.4f}, {metric.high:.4f}]")
        table.add_row("parameters", f"{self.model.num_parameters():,}")
        if all(mixer.causal for mixer in self.model.config.mixers):
            table.add_row(f"state, {self.task.tokens} tokens", f"{held_bytes(self.model, self.task.tokens):,} bytes")
        table.add_row("steps", f"{self.report.steps:,}")
        table.add_row("time", duration(self.report.seconds))
        table.add_row("training", f"{self.report.tokens_per_second:,.0f} tokens/s")
        return table


def train(
    task: TrainTask | str = "mqar",
    mixer: str | None = None,
    *,
    sizes: Sizes | None = None,
    settings: Settings | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    parallel: str = "ddp",
    tracker: str | None = None,
    test: int = 512,
    every: float = 60.0,
    show: bool | Callable[[float], None] = True,
) -> Trained | None:
    """Train a small model with any token mixer on a task, and judge it on examples that it never saw.

    Args:
        task: `"mqar:pairs=8,length=64"`; see `TRAIN_TASKS`.
        mixer: `"based:window=16"`, in place of the one in `sizes`; several joined by `+` take turns, layer by layer.
        sizes: of the model, and what stands in its other slots.
        settings: of the training.
        out: a folder. Checkpoints are kept there, so that the same call goes on where it was stopped, by whatever
            (`kill -9` too), with the losses that it would have had; in the end it has `model/` and `result.json`. A
            finished folder is opened, not trained again. None: nothing is kept.
        device: `cpu`, `cuda`, `cuda:1`, ... or `auto`.
        parallel: under `torchrun`, `ddp` or `fsdp`.
        tracker: where figures go as well: `tensorboard`, `wandb`, or any other that accelerate knows.
        test: examples that it is judged by.
        every: seconds between checkpoints.
        show: whether to tell on the standard error how far it is; or a function that is told the fraction.

    Returns:
        What was trained; None in all processes of several but the first.

    Raises:
        FoveateError: something that doesn't fit together; a folder of another run, or in use.

    Example:
        >>> import foveate as fv
        >>> from foveate.train import Settings
        >>> got = fv.train("mqar:pairs=1,length=8,vocab=8", "linear", settings=Settings(steps=20), show=False)
        >>> got.report.steps, sorted(got.metrics)
        (20, ['accuracy', 'loss'])
    """
    task = TRAIN_TASKS.parse(task) if isinstance(task, str) else task
    sizes, settings = sizes or Sizes(), settings or Settings()
    if mixer is not None:
        sizes = Sizes(**{**asdict(sizes), "mixer": mixer})
    place = device_of(device)
    task.check()
    model = build(task, sizes, seed=settings.seed)  # before anything is written: it says what can't be built
    place = processes.join(place)
    said = {"task": str(task), "sizes": asdict(sizes), "settings": asdict(settings)}
    with contextlib.ExitStack() as stack:
        folder = None if out is None else Path(out).expanduser().absolute()
        if folder is not None:
            if processes.is_main():
                stack.enter_context(_ours(folder, said))
            processes.wait()
            if (folder / RESULT).exists():
                return _opened(folder, task, sizes, settings, place) if processes.is_main() else None
        model.to(place)  # type: ignore[arg-type]
        verb = Show(show if processes.is_main() or callable(show) else False, "train")
        told = stack.enter_context(_tracked(tracker, folder, said)) if processes.is_main() else _silent
        with verb:
            work = None if folder is None else folder / "work"
            report = fit(model, task, settings, work=work, every=every, parallel=parallel, show=verb, told=told)
        if not processes.is_main():
            return None
        if processes.world() > 1:  # without what spread it, which would wait for the others in every forward
            trained, model = model, build(task, sizes, seed=settings.seed).to(place)  # type: ignore[arg-type]
            values = {**dict(trained.named_parameters()), **dict(trained.named_buffers())}
            model.load_state_dict({name: values[name] for name in values if name in model.state_dict()}, strict=False)
            model.eval()
        metrics = task.judge(model, count=test)
        told(report.steps, {name: metric.value for name, metric in metrics.items()})
        if folder is not None:
            _keep(folder, model, report, metrics)
    return Trained(model, task, sizes, settings, report, metrics, folder)


def default_out(task: str, sizes: Sizes, settings: Settings) -> Path:
    """Where a run is kept that was given no place: the same for the same command, so that it goes on.

    Example:
        >>> default_out("mqar:pairs=4", Sizes(), Settings()).as_posix()
        'runs/mqar-softmax-...'
    """
    said = json.dumps([task, asdict(sizes), asdict(settings)], sort_keys=True)
    name = "-".join(each.partition(":")[0] for each in (task, sizes.mixer.partition("+")[0]))
    return Path("runs", f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:6]}")


# ---- the folder ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ours(folder: Path, said: dict[str, Any]) -> Iterator[None]:
    """Inside, the folder is there, is of this run, and no other process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FoveateError(f"{folder} is in use by another process: wait for it, or give another --out.") from error
    except OSError as error:
        raise FoveateError(f"{folder} can't be a run's folder ({error.strerror}): give another --out.") from error
    try:
        what = folder / WHAT
        if what.exists():
            try:
                made = json.loads(what.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise FoveateError(f"{what} is damaged: give another --out.") from error
            _check_same(folder, made, json.loads(json.dumps(said)))
        elif strange := [
            n for n in (each.name for each in folder.iterdir()) if not n.startswith((".lock", f".{WHAT}"))
        ]:
            raise FoveateError(f"{folder} holds {strange[0]}, and is no folder of a training: give another --out.")
        else:
            _write(what, json.dumps(said, indent=1))
        yield
    finally:
        lock.release()


def _check_same(folder: Path, made: dict[str, Any], said: dict[str, Any]) -> None:
    for part in said:
        before, now = made.get(part), said[part]
        if before == now:
            continue
        pairs = (
            [(f"{key} {before.get(key)}", f"{now[key]}") for key in now if before.get(key) != now[key]]
            if isinstance(before, dict) and isinstance(now, dict)
            else [(f"{part} {before}", f"{now}")]
        )
        raise FoveateError(
            f"{folder} was made with {pairs[0][0]}, but this run asks for {pairs[0][1]}: give another --out, or the "
            "same again."
        )


def _keep(folder: Path, model: PreTrainedModel, report: Report, metrics: dict[str, Metric]) -> None:
    """The model first, then the result: where there is a result, the run is finished and whole."""
    unfinished = folder / ".model"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        with quiet():
            model.save_pretrained(unfinished)
        shutil.rmtree(folder / "model", ignore_errors=True)
        unfinished.rename(folder / "model")
        result = {"report": asdict(report), "metrics": {name: each.to_json() for name, each in metrics.items()}}
        _write(folder / RESULT, json.dumps(result))
        shutil.rmtree(folder / "work", ignore_errors=True)
    except OSError as error:
        raise unwritten(folder, error) from error


def _opened(folder: Path, task: TrainTask, sizes: Sizes, settings: Settings, device: torch.device) -> Trained:
    """A finished run as it was left."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        report = Report(**{**result["report"], "judged": [tuple(each) for each in result["report"]["judged"]]})
        metrics = {name: Metric(**each) for name, each in result["metrics"].items()}
        with quiet():
            model: Any = HEADS[task.head].from_pretrained(folder / "model")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FoveateError(f"{folder} is damaged ({error}): delete it, or give another --out.") from error
    return Trained(model.to(device).eval(), task, sizes, settings, report, metrics, folder)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise unwritten(path, error) from error


# ---- trackers -----------------------------------------------------------------------------------------------------


def _silent(step: int, figures: dict[str, float]) -> None:
    pass


@contextlib.contextmanager
def _tracked(name: str | None, folder: Path | None, said: dict[str, Any]) -> Iterator[Callable[..., None]]:
    """A function that hands a step's figures to a tracker."""
    if name is None:
        yield _silent
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(getattr(each, "value", each)): each for each in LOGGER_TYPE_TO_CLASS}
    if name not in known:
        raise FoveateError(f"there is no tracker called {name!r}: {nearest(name, known)}")
    if name not in {str(getattr(each, "value", each)) for each in get_available_trackers()}:
        raise FoveateError(f"the tracker {name} needs its package, which is not installed: pip install {name}.")
    kind = LOGGER_TYPE_TO_CLASS[known[name]]
    flat = {"task": said["task"], **said["sizes"], **said["settings"]}
    with_folder = {"logging_dir": str(folder or Path("runs"))} if kind.requires_logging_directory else {}
    tracker = kind("foveate-train", **with_folder)
    if hasattr(tracker, "start"):
        tracker.start()
    tracker.store_init_configuration({k: v for k, v in flat.items() if v is not None})
    try:
        yield lambda step, figures: tracker.log(figures, step=step)
    finally:
        tracker.finish()
