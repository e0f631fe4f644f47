"""What healing is: a changed model recovers what the change cost it, with the original as its teacher."""

from __future__ import annotations

import copy
import importlib
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar, cast, dataclass_transform

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.errors import FoveateError
from foveate.methods import PARTS, Part
from foveate.models.anatomy import anatomy
from foveate.models.load import tokenizer_for
from foveate.specs import Registry
from foveate.train import processes
from foveate.train.show import Show

C = TypeVar("C", bound=type)

CHECKPOINT_EVERY = 120.0
"""Seconds between checkpoints, where a folder to work in is given."""


@dataclass
class Job:
    """One healing.

    Attributes:
        student: the changed model; changed in place.
        teacher: the original; only read.
        tokenizer: gives their tokenizer; called only where text is read.
        work: a folder for samples and checkpoints, where a stopped run goes on; None: nothing is kept.
        every: seconds between checkpoints.
        show: the progress.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    work: Path | None
    every: float
    show: Show


@dataclass(frozen=True)
class HealReport:
    """What healing did.

    Attributes:
        spec: what was asked for, as text.
        tokens: tokens that the student learned from, those read again counted again.
        seconds: what that took, over all runs where it was stopped in between; without sampling.
        curve: (tokens seen, loss, averaged since the point before), at most 100 points; empty without training.
    """

    spec: str
    tokens: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Heal(Part):
    """A way to heal, a frozen dataclass of its settings: `"distill:tokens=2M"`. A technique overrides `run`.

    Class attributes: `name`; `paper`, None for common knowledge; `claim`, one line: what it is said to do.
    """

    role: ClassVar[str] = "heal"
    field: ClassVar[str] = "heal"

    @abstractmethod
    def run(self, job: Job) -> HealReport:
        """Heal `job.student` in place."""


def _load_heals() -> None:
    importlib.import_module("foveate.heal")


HEALS: Registry[Heal] = Registry("way to heal", _load_heals)
Heal.registry = HEALS
PARTS.append(HEALS)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def way(name: str) -> Callable[[C], C]:
    """Class decorator: register a way to heal under its short name, as a frozen keyword-only dataclass."""
    return HEALS.register(name)


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    spec: str | Heal,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    work: Path | str | None = None,
    progress: bool | Callable[[float], None] = True,
    every: float = CHECKPOINT_EVERY,
) -> HealReport:
    """Heal a changed model, in place: it is left in eval mode, with its dtype and what may be trained as they were.

    Under `torchrun` all processes call it with the same arguments; each works on its share of every batch, holds a
    share of the weights while training (FSDP2), and has the whole healed model in the end. The first one prints and
    writes.

    Args:
        student: the changed model; its layers may differ in width, and sublayers may be missing.
        teacher: the original; left as it is.
        spec: `none`, `bias`, `lora:rank=16`, `distill:tokens=2M`, `minilm`, or such an object.
        tokenizer: theirs; by default the one that `load` gave with the teacher.
        work: a folder of this run's own. Text sampled from the teacher and a checkpoint every so often go there, and
            the same call goes on from there after a stop, to the same weights. None: nothing is kept.
        progress: True: a bar, or lines where there is no terminal; False: nothing; or a function that is called with
            the fraction done.
        every: seconds between checkpoints.

    Raises:
        FoveateError: an unknown way to heal or field, models that don't go together, too little text, a folder that
            holds another run, a loss that is no longer a number.

    Example:
        >>> import foveate as fv
        >>> from foveate.heal import heal
        >>> teacher, student = fv.tiny("llama"), fv.tiny("llama", seed=1)
        >>> report = heal(student, teacher, "distill:tokens=1k,batch=4,length=32,data=samples", progress=False)
        >>> report.tokens, len(report.curve)
        (1024, 8)
    """
    spec = spec if isinstance(spec, Heal) else HEALS.parse(spec)
    if student is teacher:
        raise FoveateError(
            "the student and the teacher are one and the same model: load the original once more, or copy it "
            "(copy.deepcopy) before it is changed."
        )
    words = [cast(int, anatomy(model).embedding.num_embeddings) for model in (student, teacher)]
    if words[0] != words[1]:
        raise FoveateError(
            f"the student knows {words[0]} tokens and the teacher {words[1]}: heal a model with the original that it "
            "was made from."
        )
    device = processes.join(student.device)
    for model in (student, teacher):
        if model.device != device:
            model.to(device)  # type: ignore[arg-type]
    mode = teacher.training
    with Show(progress if processes.is_main() or callable(progress) else False) as show:
        job = Job(
            student.eval(),
            teacher.eval(),
            lambda: tokenizer or tokenizer_for(teacher),
            None if work is None else Path(work),
            every,
            show,
        )
        try:
            return spec.run(job)
        finally:
            teacher.train(mode)


def number(text: int | str, what: str) -> int:
    """A number of tokens as people write it.

    Raises:
        FoveateError: it is none, or not positive.

    Example:
        >>> from foveate.heal.base import number
        >>> number("2M", "tokens"), number("1.5k", "tokens"), number(300, "tokens")
        (2000000, 1500, 300)
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*)([kMGB]?)", str(text).strip().replace("_", ""))
    count = round(float(match[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}[match[2]]) if match else 0
    if count < 1:
        raise FoveateError(f"{what}={text} is no number of tokens: give one such as 300k, 2M or 1B.")
    return count


@contextmanager
def reader(teacher: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The teacher as it is read: on a GPU a copy in bfloat16, where its weights are float32."""
    if teacher.device.type == "cuda" and next(teacher.parameters()).dtype == torch.float32:
        teacher = copy.deepcopy(teacher)
        for parameter in teacher.parameters():  # not buffers: rotary frequencies stay float32
            parameter.data = parameter.data.to(torch.bfloat16)
    yield teacher
