"""What claims share that train: small models trained on the spot, several seeds of each, and figures over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from foveate.backbone import Backbone, state_bytes
from foveate.measure.bootstrap import Metric
from foveate.train.build import Sizes, build
from foveate.train.loop import Report, Settings, fit
from foveate.train.show import Show
from foveate.train.tasks import TRAIN_TASKS, TrainTask

# Two-sided 95% of Student's t, by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Learned:
    """One model after training.

    Attributes:
        model: in eval mode.
        report: how training went.
        scores: the task's metrics on test examples, their values.
    """

    model: Backbone
    report: Report
    scores: dict[str, float]


def learned(
    task: TrainTask | str,
    sizes: Sizes,
    settings: Settings,
    *,
    device: torch.device,
    judge: TrainTask | str | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> Learned:
    """Train one model and judge it.

    Args:
        judge: the task to judge by, where it is another than the one learned (a longer text, say).
        progress: told the fraction done.

    Example:
        >>> from foveate.train import Settings, Sizes
        >>> got = learned("mqar:pairs=1,length=8,vocab=8", Sizes(width=32), Settings(steps=40, lr=3e-3),
        ...     device=torch.device("cpu"))
        >>> got.report.steps, got.scores["accuracy"] > 0.25
        (40, True)
    """
    task = TRAIN_TASKS.parse(task) if isinstance(task, str) else task
    judge = TRAIN_TASKS.parse(judge) if isinstance(judge, str) else judge or task
    model = build(task, sizes, seed=settings.seed).to(device)  # type: ignore[arg-type]
    report = fit(model, task, settings, show=Show(progress))
    return Learned(model, report, {name: each.value for name, each in judge.judge(model).items()})


def by_seed(
    task: TrainTask | str,
    models: Mapping[str, Sizes],
    settings: Settings,
    *,
    device: torch.device,
    seeds: Sequence[int] = (0, 1, 2),
    judge: TrainTask | str | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, list[Learned]]:
    """Each model trained with each seed: for each name, one `Learned` a seed, in the order of the seeds.

    All models of one seed see the same batches, so that their differences are paired.
    """
    found: dict[str, list[Learned]] = {name: [] for name in models}
    total, done = len(models) * len(seeds), 0
    for seed in seeds:
        for name, sizes in models.items():
            got = learned(
                task,
                sizes,
                replace(settings, seed=seed),
                device=device,
                judge=judge,
                progress=lambda part, done=done: progress((done + part) / total),  # type: ignore[misc]
            )
            found[name].append(got)
            done += 1
    return found


def over_seeds(values: Sequence[float]) -> Metric:
    """The mean over seeds, with a 95% interval by Student's t (wide with three seeds, as it should be).

    Example:
        >>> metric = over_seeds([1.0, 2.0, 3.0])
        >>> metric.value, round(metric.high, 2)
        (2.0, 4.48)
    """
    middle = statistics.fmean(values)
    if len(values) < 2:
        return Metric.exact(middle)
    half = _T95.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return Metric(middle, middle - half, middle + half)


def differences(ours: Sequence[Learned], theirs: Sequence[Learned], metric: str) -> Metric:
    """How much higher a metric is than another model's, paired by seed: the mean, with its interval over seeds."""
    return over_seeds([a.scores[metric] - b.scores[metric] for a, b in zip(ours, theirs, strict=True)])


@torch.no_grad()
def held_bytes(model: Backbone, tokens: int, batch: int = 1) -> int:
    """Bytes that a model holds of a text of that many tokens: the states of all layers, whole storages.

    Example:
        >>> from foveate.train import Sizes, build
        >>> held_bytes(build(TRAIN_TASKS.parse("mqar")), 64) == 64 * 2 * 64 * 2 * 4 + 2 * 8   # keys, values; a count
        True
    """
    given = (
        {"input_ids": torch.ones(batch, tokens, dtype=torch.long, device=model.device)}
        if model.embed is not None
        else {"inputs_embeds": torch.ones(batch, tokens, model.config.input_size, device=model.device)}
    )
    training = model.training
    model.eval()
    cache = model.hidden(**given, use_cache=True).past_key_values  # type: ignore[arg-type]
    model.train(training)
    return state_bytes(cache.text.state)  # type: ignore[union-attr]
