"""The loop that every way to heal with training runs: plain PyTorch, on one device or several."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import signal
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.errors import FoveateError
from foveate.heal.base import Heal, HealReport, Job, number, reader
from foveate.heal.text import digest, sequences
from foveate.models.anatomy import anatomy
from foveate.specs import nearest
from foveate.train import checkpoint, processes
from foveate.train.checkpoint import State
from foveate.train.schedule import SCHEDULES, rate
from foveate.train.show import duration

LOOK_EVERY = 1.0
"""Seconds between looks at the loss, each of which waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Trained(Heal):
    """A way to heal that trains; a technique says what the loss is, in `objective`.

    It ends at `tokens` or `seconds`, whichever comes first, and the learning rate knows of both.

    Fields:
        tokens: tokens to learn from, such as 300k or 2M; text is read again where there is less of it.
        seconds: of training at most (sampling comes on top); None: no bound.
        data: `calibration`, `samples` (texts that the original writes), `prose` or `code` (their calibration parts),
            the path of a text file, or `hub:NAME`; several joined by `+` give as much each, as far as they reach.
        samples: tokens to sample at most, with data=samples.
        lr: the highest learning rate of AdamW.
        batch: sequences of a step, over all processes.
        length: tokens of a sequence.
        pieces: parts in which a process's share of a batch goes through the model one after the other, to save memory.
        warmup: the fraction of the run in which the learning rate rises.
        schedule: what it does then: `cosine`, or `wsd` (level, and down over the last fifth).
        seed: of the order of the text, the sampling, and what is made at random.
        compile: whether the layers are compiled, on a GPU: quicker steps after a slow first one.
        bfloat16: whether matrix products are made in bfloat16, from float32 weights; None: on a GPU. Some CPUs (with
            AMX) are several times as fast with it.
    """

    tokens: int | str = "2M"
    seconds: float | None = None
    data: str = "calibration"
    samples: int | str = "1M"
    lr: float = 2e-4
    batch: int = 16
    length: int = 512
    pieces: int = 1
    warmup: float = 0.05
    schedule: str = "cosine"
    seed: int = 0
    compile: bool = False
    bfloat16: bool | None = None

    def __post_init__(self) -> None:
        number(self.tokens, "tokens")
        number(self.samples, "samples")
        if self.schedule not in SCHEDULES:
            raise FoveateError(
                f"{self.name}: there is no schedule {self.schedule!r}: {nearest(self.schedule, SCHEDULES)}"
            )
        if min(self.batch, self.pieces) < 1 or self.length < 2 or not 0 <= self.warmup < 1 or self.lr <= 0:
            raise FoveateError(
                f"{self}: batch and pieces must be at least 1, length at least 2, warmup in [0, 1), lr above 0."
            )
        if self.seconds is not None and self.seconds <= 0:
            raise FoveateError(f"{self}: seconds must be above 0, or left out.")

    @abstractmethod
    def objective(self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> nn.Module:
        """What is minimised: a module that holds the student, and whose forward takes ids (batch, length) to a loss.

        The loss is a mean over the batch. Whatever parameters the module has besides the student's are trained too.

        Args:
            student: its floating parameters are float32; those to be trained ask for gradients.
            teacher: asks for none. On a GPU its weights are bfloat16.
            rows: some of the text, (rows, length), to fit such parameters on.
        """

    def mixed(self, device: torch.device) -> torch.autocast:
        """In force while a loss is made: which products are made in bfloat16."""
        wanted = device.type == "cuda" if self.bfloat16 is None else self.bfloat16
        return torch.autocast(device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)

    def wrapped(self, student: PreTrainedModel) -> PreTrainedModel:
        """The student as it is to be trained, with `requires_grad` where it learns: by default all it has."""
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return student

    def unwrapped(self, student: PreTrainedModel) -> None:
        """Undo what `wrapped` put around the student, in place, keeping what was learned."""

    def run(self, job: Job) -> HealReport:
        share = processes.world() * self.pieces
        if self.batch % share:
            raise FoveateError(
                f"{self}: a batch of {self.batch} sequences can't be shared by {processes.world()} processes in "
                f"{self.pieces} pieces each: give a multiple of {share}."
            )
        count = number(self.tokens, "tokens")
        rows = sequences(job, self.data, count, self.length, number(self.samples, "samples"), self.seed)
        run = {
            "spec": str(self),
            "student": digest(job.student),
            "teacher": digest(job.teacher),
            "text": digest_of(rows),
        }
        # Sharded weights can't be made plain again in place, so that several processes train a copy.
        student = job.student if processes.world() == 1 else copy.deepcopy(job.student)
        with _trainable(student), reader(job.teacher) as teacher:
            _check_logits(student, rows)
            _check_logits(teacher, rows)
            _note_frozen(job, student)
            with _seeded(self.seed, rows.device):
                wrapped = self.wrapped(student)
            try:
                with _seeded(self.seed, rows.device):
                    objective = self.objective(wrapped, teacher, rows[: max(1, 4096 // self.length)])
                report = self._loop(job, objective, rows, State(run), count)
            finally:
                self.unwrapped(wrapped)
        if student is not job.student:
            _copy_back(student, job.student)
        return report

    def _loop(self, job: Job, objective: nn.Module, rows: Tensor, state: State, count: int) -> HealReport:
        device = rows.device
        if processes.world() > 1:
            _shard(objective, device)
        trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            trained.values(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
        )
        if job.work is not None:
            state = checkpoint.restore(job.work, state, trained, optimizer)
            if state.step:
                job.show.say(f"goes on at step {state.step:,}, from the checkpoint in {job.work}")
        steps = math.ceil(count / (self.batch * self.length))
        start, before = time.monotonic(), state.seconds
        looked = saved = start
        first = state.step
        batches = _batches(rows, self.batch, self.seed, first)
        losses: list[Tensor] = []
        saved_step = state.step

        def look() -> None:
            if losses:
                state.losses += processes.mean(torch.stack(losses)).tolist()
                losses.clear()
            if state.losses and not math.isfinite(state.losses[-1]):
                raise FoveateError(
                    f"{self}: the loss is no longer a number at step {state.step}: give a smaller lr. The student's "
                    "weights are of no use now."
                )
            state.seconds = before + time.monotonic() - start

        def part() -> float:
            done = state.step / steps
            if self.seconds is not None:
                done = max(done, _agreed((before + time.monotonic() - start) / self.seconds, device))
            return done

        with _compiled(objective, self.compile and device.type == "cuda"), _interrupts(job) as stop:
            while (done := part()) < 1:
                if stop.is_set() and job.work is not None:
                    look()
                    checkpoint.save(job.work, state, trained, optimizer)
                    job.show.say(f"stopped at step {state.step:,}: the same call goes on from there")
                    raise KeyboardInterrupt
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * rate(done, self.warmup, self.schedule)
                total = torch.zeros((), device=device)
                for ids in next(batches).chunk(self.pieces):
                    with self.mixed(device):
                        loss = objective(ids) / self.pieces
                    loss.backward()
                    total += loss.detach()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(total)
                state.step += 1
                now = time.monotonic()
                # Every process has to save when one does, so that with several the first one's clock decides.
                if now - looked >= LOOK_EVERY and processes.world() == 1 or state.step % 20 == 0:
                    look()
                    looked = now
                    done = part()
                    speed = (state.step - first) * self.batch * self.length / (now - start)
                    left = (now - start) * (1 - done) / max(1e-9, done - first / steps)
                    figures = f"loss {state.losses[-1]:.4f}, {speed:,.0f} tokens/s, {duration(max(0, left))} left"
                    job.show.at("train", min(1.0, done), figures)
                    if job.work is not None and _agreed(now - saved, device) >= job.every:
                        checkpoint.save(job.work, state, trained, optimizer)
                        saved, saved_step = time.monotonic(), state.step
        look()
        if job.work is not None and saved_step < state.step:
            checkpoint.save(job.work, state, trained, optimizer)
        if processes.world() > 1:
            _gather(objective)
        seen = self.batch * self.length
        job.show.at("train", 1.0, f"{state.step * seen:,} tokens, {duration(state.seconds)}")
        return HealReport(str(self), state.step * seen, state.seconds, _curve(state.losses, seen))


@contextmanager
def _interrupts(job: Job) -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that the step is finished and a checkpoint written; a second one stops at once."""
    stop = threading.Event()

    def asked(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if job.work is None or processes.world() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, asked)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def digest_of(rows: Tensor) -> str:
    """16 hexadecimal digits that change with the text."""
    return hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()[:16]


def _batches(rows: Tensor, size: int, seed: int, step: int) -> Iterator[Tensor]:
    """This process's share of each step's rows, from a step on: every epoch in an order of its own."""

    def order(epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        return torch.randperm(len(rows), generator=generator).to(rows.device)

    share = size // processes.world()
    epoch, here = -1, torch.empty(0, dtype=torch.long)
    for first in itertools.count(step * size, size):
        picked = []
        at = first
        while at < first + size:
            if at // len(rows) != epoch:
                epoch = at // len(rows)
                here = order(epoch)
            inside = at % len(rows)
            picked.append(here[inside : inside + first + size - at])
            at += len(picked[-1])
        yield rows[torch.cat(picked)[processes.rank() * share : (processes.rank() + 1) * share]]


def _agreed(value: float, device: torch.device) -> float:
    """The first process's value, in all."""
    if processes.world() == 1:
        return value
    return float(processes.from_rank(torch.tensor(value, dtype=torch.float64, device=device)))


def _curve(losses: list[float], seen: int, points: int = 100) -> list[tuple[int, float]]:
    width = max(1, math.ceil(len(losses) / points))
    parts = [losses[start : start + width] for start in range(0, len(losses), width)]
    return [(min(len(losses), (i + 1) * width) * seen, sum(part) / len(part)) for i, part in enumerate(parts)]


# ---- the models, as they are while training -----------------------------------------------------------------------


@contextmanager
def _trainable(student: PreTrainedModel) -> Iterator[None]:
    """Floating parameters are float32 inside; after it, dtype and `requires_grad` are as they were.

    Buffers stay as they are: rotary frequencies are float32 for a reason, and codes are no numbers to train.
    """
    before = [(p, p.dtype, p.requires_grad) for p in student.parameters()]
    if not any(
        p.is_floating_point() and p.ndim > 1 for layer in anatomy(student).layers for p in layer.module.parameters()
    ):
        raise FoveateError(
            "the student's layers hold no floating weights (they are quantised), so that nothing in them can be "
            "trained: heal first, and quantise then."
        )
    try:
        for parameter, dtype, _ in before:
            if dtype.is_floating_point:
                parameter.data = parameter.data.float() if dtype != torch.float64 else parameter.data
        yield
    finally:
        for parameter, dtype, asked in before:
            parameter.requires_grad_(asked)
            parameter.grad = None
            if not hasattr(parameter, "device_mesh"):
                parameter.data = parameter.data.to(dtype)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _note_frozen(job: Job, student: PreTrainedModel) -> None:
    codes = sum(not p.is_floating_point() for p in student.parameters())
    codes += sum(b.dtype in (torch.uint8, torch.int8) for b in student.buffers())
    if codes:
        job.show.say(f"{codes} tensors are quantised and stay as they are; the rest is trained")


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float logits (..., vocab) of the last hidden states (..., hidden)."""
    logits: Tensor = anatomy(model).head(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def last_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What a model's head reads, (batch, length, hidden), of token ids (batch, length)."""
    hidden: Tensor = anatomy(model).base(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _check_logits(model: PreTrainedModel, rows: Tensor) -> None:
    """Whether hidden states and head give the model's logits: a family may scale them in some other way."""
    with torch.no_grad(), torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
        ids = rows[:1, :8]
        ours, own = logits_of(model, last_hidden(model, ids)), model(ids, use_cache=False).logits.float()
    if float((ours - own).abs().max()) > 0.02 * float(own.abs().max()):
        raise FoveateError(
            f"{anatomy(model).family} models do something to their logits that healing doesn't know of, so that they "
            "can't be healed."
        )


@contextmanager
def _compiled(objective: nn.Module, wanted: bool) -> Iterator[None]:
    """The layers of all models compiled, each by itself: equal ones share their code, and hooks stay outside.

    An objective may name layers that stay as they are, `eager`.
    """
    models: Any = objective.models
    eager: Any = getattr(objective, "eager", ())
    layers: list[Any] = [layer.module for model in models for layer in anatomy(model).layers] if wanted else []
    layers = [layer for layer in layers if layer not in eager]
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    try:
        with torch._dynamo.config.patch(recompile_limit=64) if wanted else nullcontext():
            yield
    finally:
        for layer in layers:
            del layer.forward


# ---- several processes --------------------------------------------------------------------------------------------


def _shard(objective: nn.Module, device: torch.device) -> None:
    """Spread what is trained over the processes, layer by layer (FSDP2); all at once where layers share weights.

    A layer's own weights are whole only while it runs, and another one that reads them would find a part.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.world(),))
    student: Any = objective.student
    shares = any(hasattr(module, "tie") for module in student.modules())  # portable modules that refer to others
    for layer in anatomy(student).layers:
        if not shares and any(p.requires_grad for p in layer.module.parameters()):
            fully_shard(layer.module, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def _gather(objective: nn.Module) -> None:
    """Make sharded parameters whole and plain again: modules hold new parameters then."""
    for module in objective.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and hasattr(parameter, "device_mesh"):
                module._parameters[name] = nn.Parameter(processes.whole(parameter.detach()), parameter.requires_grad)


def _copy_back(trained: PreTrainedModel, student: PreTrainedModel) -> None:
    learned = dict(trained.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.is_floating_point():
                parameter.copy_(learned[name])
