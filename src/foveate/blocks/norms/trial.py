"""What the claims of norm placements share: deep models trained on bytes, and their profiles before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from foveate.backbone import NORMS, Backbone
from foveate.backbone.model import written
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.train import Settings, Sizes, build, fit
from foveate.train.profile import DepthProfile, depth_profile
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import over_seeds


@dataclass(frozen=True)
class Deep:
    """One deep model.

    Attributes:
        loss: nats a byte on test passages; that of a uniform guess where the loss stopped being a number.
        diverged: whether it did.
        start, end: profiles before and after training.
    """

    loss: float
    diverged: bool
    start: DepthProfile
    end: DepthProfile


@torch.no_grad()
def full_start(model: Backbone) -> None:
    """Take back that the backbone starts what writes into the residual stream smaller in deeper models.

    The papers on placements start all matrices alike, and "The Curse of Depth" finds that its scaling and the smaller
    start get in each other's way.
    """
    if not NORMS.parse(model.config.norm).small_start:
        return
    for layer in model.layers:
        for part in (layer.mixer, layer.channel):
            for weight in written(part):
                weight.mul_(math.sqrt(2 * len(model.layers)))


def deep_models(
    models: Mapping[str, tuple[Sizes, Settings]],
    *,
    length: int,
    examples: int,
    seeds: Sequence[int],
    device: torch.device,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, list[Deep]]:
    """Each model trained with each seed on `lm:length=...`, in the order of the seeds.

    All models of one seed see the same batches, so that their differences are paired.

    Args:
        examples: test passages that judge; an eighth as many validation passages make the profiles.
    """
    task = TRAIN_TASKS.parse(f"lm:length={length}")
    found: dict[str, list[Deep]] = {name: [] for name in models}
    total, done = len(models) * len(seeds), 0
    for seed in seeds:
        for name, (sizes, settings) in models.items():
            model = build(task, sizes, seed=seed)
            full_start(model)
            model = model.to(device)  # type: ignore[arg-type]
            start, diverged = depth_profile(model, task, count=examples // 8, seed=seed), False
            try:
                fit(model, task, replace(settings, seed=seed))
            except FoveateError:  # the loss is no number any more
                diverged = True
            loss = math.log(task.vocabulary) if diverged else task.judge(model, count=examples)["loss"].value
            end = start if diverged else depth_profile(model, task, count=examples // 8, seed=seed)
            found[name].append(Deep(loss, diverged, start, end))
            done += 1
            progress(done / total)
    return found


def paired(ours: Sequence[Deep], theirs: Sequence[Deep], figure: Callable[[Deep], float]) -> Metric:
    """How much higher a figure is than another model's, paired by seed, with its interval over seeds."""
    return over_seeds([figure(a) - figure(b) for a, b in zip(ours, theirs, strict=True)])


def figures(found: Mapping[str, Sequence[Deep]]) -> dict[str, Metric]:
    """What claims of placements tell of each model."""
    told: dict[str, Callable[[Deep], float]] = {
        "nats a byte": lambda run: run.loss,
        "last layer's variance over the first's, start": lambda run: run.start.growth("variance"),
        "last layer's variance over the first's, end": lambda run: run.end.growth("variance"),
        "largest value of the stream, end": lambda run: float(run.end.largest.max()),
        "unevenness of gradients, start": lambda run: run.start.spread("gradient"),
        "unevenness of gradients, end": lambda run: run.end.spread("gradient"),
        "last layer's gradient over the first's, start": lambda run: run.start.growth("gradient"),
        "last layer's gradient over the first's, end": lambda run: run.end.growth("gradient"),
        "nats lost without one layer of the deep half": lambda run: run.end.deep("damage"),
    }
    return {
        f"{what}, {name}": over_seeds([figure(run) for run in runs])
        for what, figure in told.items()
        for name, runs in found.items()
    }
