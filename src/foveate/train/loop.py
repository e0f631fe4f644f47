"""The training loop: plain PyTorch, on one device or several, that goes on where it was killed."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.backbone import Backbone
from foveate.errors import FoveateError
from foveate.specs import nearest
from foveate.train import checkpoint, processes
from foveate.train.checkpoint import State
from foveate.train.schedule import SCHEDULES, rate
from foveate.train.show import Show, duration
from foveate.train.tasks import Batch, TrainTask

LOOK_EVERY = 1.0
"""Seconds between looks at the loss, each of which waits for the device."""
JUDGE_EVERY = 0.05
"""The fraction of a run between looks at the validation examples, where `until` asks for them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is trained.

    Attributes:
        steps: at most.
        batch: examples of a step, over all processes.
        lr: the highest learning rate of AdamW (betas 0.9, 0.95).
        warmup: the fraction of the run in which it rises.
        schedule: what it does then: `cosine`, or `wsd` (level, and down over the last fifth).
        decay: weight decay of all parameters with two dimensions or more; norms, biases and other vectors have none.
        clip: the gradient's norm is cut to that.
        until: stop when the task's first metric on validation examples reaches that; None: after all steps.
        seed: of weights, data, and all that is drawn in a step.
        pieces: parts of a process's share of a batch that go through one after the other, to save memory.
        compile: whether the model is compiled: quicker steps, a minute later.
        bfloat16: whether matrix products are made in bfloat16, from float32 weights; None: on a GPU.
    """

    steps: int = 1000
    batch: int = 64
    lr: float = 1e-3
    warmup: float = 0.1
    schedule: str = "cosine"
    decay: float = 0.1
    clip: float = 1.0
    until: float | None = None
    seed: int = 0
    pieces: int = 1
    compile: bool = False
    bfloat16: bool | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise FoveateError(f"there is no schedule {self.schedule!r}: {nearest(self.schedule, SCHEDULES)}")
        if min(self.steps, self.batch, self.pieces) < 1:
            raise FoveateError("steps, batch and pieces must be at least 1.")
        if not 0 <= self.warmup < 1 or self.lr <= 0 or self.clip <= 0 or self.decay < 0:
            raise FoveateError("warmup must be in [0, 1), lr and clip above 0, decay 0 or more.")


@dataclass(frozen=True)
class Report:
    """What training did.

    Attributes:
        steps: taken; fewer than asked for where `until` was reached.
        seconds: that they took, over all runs where it was stopped in between, judging included.
        tokens_per_second: the median over the second half of the run.
        losses: of each step, nats or squared errors.
        judged: (step, the task's first metric on validation examples), where `until` asked for it.
    """

    steps: int
    seconds: float
    tokens_per_second: float
    losses: list[float] = field(repr=False)
    judged: list[tuple[int, float]] = field(default_factory=list, repr=False)


def fit(
    model: Backbone,
    task: TrainTask,
    settings: Settings,
    *,
    work: Path | None = None,
    every: float = 60.0,
    parallel: str = "ddp",
    show: Show | None = None,
    told: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
    run: dict[str, str] | None = None,
) -> Report:
    """Train a model on a task, in place.

    Args:
        model: on its device, in float32. With several processes every one has the same.
        work: a folder for checkpoints, where a stopped run goes on with the losses that it would have had; None:
            nothing is kept.
        every: seconds between checkpoints.
        parallel: with several processes (`torchrun`), `ddp` (each has the whole model) or `fsdp` (each has a part).
        show: the progress; None: nothing is shown.
        told: called with a step and its figures (`loss`, `lr`, `tokens_per_second`), now and then.
        run: what the run is made of, by name: another run's checkpoint is refused.

    Raises:
        FoveateError: the batch can't be shared out, the loss is no number any more, the checkpoint is another run's.
    """
    device, world = model.device, processes.world()
    if settings.batch % (world * settings.pieces):
        raise FoveateError(
            f"a batch of {settings.batch} can't be shared by {world} processes in {settings.pieces} pieces each: "
            f"give a multiple of {world * settings.pieces}."
        )
    show = show or Show(False)
    wrapped = _spread(model, parallel)
    optimizer = _optimizer(model, settings)
    kept = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept |= {name: b for name, b in model.named_buffers() if name in model.state_dict()}  # type: ignore[misc]
    state = State({"settings": _said(settings), "task": str(task), "model": _shape(model)} | (run or {}))
    if work is not None:
        state = checkpoint.restore(work, state, kept, optimizer)
        if state.step:
            show.say(f"goes on at step {state.step:,}, from the checkpoint in {work}")
    step_loss: Any = _Loss(wrapped, task)
    if settings.compile:
        step_loss = torch.compile(step_loss, dynamic=False)
    wanted = device.type == "cuda" if settings.bfloat16 is None else settings.bfloat16
    share = settings.batch // world
    start, before = time.monotonic(), state.seconds
    looked = saved = start
    fresh: list[Tensor] = []
    speeds: list[float] = []
    looked_step = state.step
    model.train()

    def look() -> None:
        nonlocal looked, looked_step
        if fresh:
            state.losses += processes.mean(torch.stack(fresh)).tolist()
            fresh.clear()
        state.seconds = before + time.monotonic() - start
        if state.losses and not math.isfinite(state.losses[-1]):
            raise FoveateError(
                f"the loss is no longer a number at step {state.step}: give a smaller lr, or a longer warmup."
            )
        now = time.monotonic()
        if state.step > looked_step:
            speeds.append((state.step - looked_step) * settings.batch * task.tokens / max(1e-9, now - looked))
        looked, looked_step = now, state.step

    def save() -> None:
        if work is not None:
            checkpoint.save(work, state, kept, optimizer)

    with _interrupts(work is not None) as stop:
        while state.step < settings.steps and not (state.judged and _reached(state.judged[-1][1], task, settings)):
            if stop.is_set():
                look()
                save()
                show.say(f"stopped at step {state.step:,}: the same command goes on from there")
                raise KeyboardInterrupt
            lr = settings.lr * rate(state.step / settings.steps, settings.warmup, settings.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # All that a step draws hangs on its number alone, so that a stopped run goes on as if it had not been.
            torch.manual_seed(hash((settings.seed, state.step, processes.rank())) % 2**63)
            drawn = task.batch(settings.batch, "train", state.step, device, settings.seed)
            mine = Batch(*(each[processes.rank() * share : (processes.rank() + 1) * share] for each in drawn))
            total = torch.zeros((), device=device)
            for inputs, targets in zip(*(each.chunk(settings.pieces) for each in mine), strict=True):
                with torch.autocast(device.type, torch.bfloat16, enabled=wanted):
                    loss = step_loss(inputs, targets) / settings.pieces
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            fresh.append(total)
            state.step += 1
            now = time.monotonic()
            if (now - looked >= LOOK_EVERY and world == 1) or state.step % 50 == 0 or state.step == settings.steps:
                look()
                done = state.step / settings.steps
                left = state.seconds / state.step * (settings.steps - state.step)
                figures = {"loss": state.losses[-1], "lr": lr, "tokens_per_second": speeds[-1]}
                told(state.step, figures)
                note = f"loss {state.losses[-1]:.4f}, {speeds[-1]:,.0f} tokens/s, {duration(left)} left"
                show.at("train", done, note)
                # Every process has to save when one does, so that the first one's clock decides.
                if work is not None and _agreed(now - saved, device) >= every:
                    save()
                    saved = time.monotonic()
            if settings.until is not None and _due(state.step, settings.steps):
                _same_buffers(model)
                value = task.judge(model, split="validation", count=128)[task.better].value
                state.judged.append([state.step, _agreed(value, device)])  # or some would stop, and the others wait
                look()
                looked, looked_step = time.monotonic(), state.step  # judging is not training's speed
    look()
    save()
    _same_buffers(model)
    _gather(model)
    model.eval()
    late = sorted(speeds[len(speeds) // 2 :])
    speed = late[len(late) // 2] if late else state.step * settings.batch * task.tokens / max(1e-9, state.seconds)
    show.at("train", 1.0, f"{state.step:,} steps, {duration(state.seconds)}")
    return Report(state.step, state.seconds, speed, state.losses, [(int(s), value) for s, value in state.judged])


class _Loss(nn.Module):
    """What is compiled: a batch to its loss."""

    def __init__(self, model: nn.Module, task: TrainTask):
        super().__init__()
        self.model, self.given = model, "input_ids" if task.vocabulary else "inputs_embeds"

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(**{self.given: inputs}, targets=targets).loss
        return loss


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": settings.decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95), fused=fused)


def _said(settings: Settings) -> str:
    return json.dumps(asdict(settings), sort_keys=True)


def _shape(model: Backbone) -> str:
    """What a model is made of, as text."""
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "mixer",
        "norm",
        "channel",
        "stack",
        "conv",
    )
    return ", ".join(f"{name} {getattr(model.config, name)}" for name in names)


def _reached(value: float, task: TrainTask, settings: Settings) -> bool:
    until = settings.until
    return until is not None and (value >= until if task.higher else value <= until)


def _due(step: int, steps: int) -> bool:
    return step % max(1, round(JUDGE_EVERY * steps)) == 0


def _agreed(value: float, device: torch.device) -> float:
    """The first process's value, in all."""
    if processes.world() == 1:
        return value
    return float(processes.from_rank(torch.tensor(value, dtype=torch.float64, device=device)))


@contextmanager
def _interrupts(wanted: bool) -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that the step is finished and a checkpoint written; a second one stops at once."""
    stop = threading.Event()

    def asked(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if not wanted or processes.world() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, asked)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


# ---- several processes --------------------------------------------------------------------------------------------


def _spread(model: Backbone, parallel: str) -> nn.Module:
    """The model as it runs: itself, in DDP, or sharded layer by layer (FSDP2)."""
    if parallel not in ("ddp", "fsdp"):
        raise FoveateError(f"there is no way to be parallel called {parallel!r}: give ddp or fsdp.")
    if processes.world() == 1:
        return model
    if parallel == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        device = [model.device.index] if model.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.device.type, (processes.world(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _same_buffers(model: nn.Module) -> None:
    """The first process's buffers in all: some mixers follow the tokens with theirs, and each process sees its own."""
    if processes.world() > 1:
        for buffer in model.buffers():
            processes.from_rank(buffer)


def _gather(model: nn.Module) -> None:
    """Make sharded parameters whole and plain again: modules hold new parameters then."""
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and hasattr(parameter, "device_mesh"):
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(processes.whole(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
