"""Induction: after a token that came before, say what followed it then."""

from __future__ import annotations

import torch

from foveate.errors import FoveateError
from foveate.train.tasks.base import Batch, TrainTask, train_task


@train_task("induction")
class Induction(TrainTask):
    """After "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752, section 3.1).

    A text of random tokens holds one special token, somewhere, and ends with it: what followed it is asked for.

    Fields:
        length: tokens of a text.
        vocab: tokens, the special one among them.
    """

    about = "what followed a token the last time it came"

    length: int = 64
    vocab: int = 16

    def __post_init__(self) -> None:
        if self.length < 3 or self.vocab < 3:
            raise FoveateError(f"{self}: length and vocab must be 3 or more.")

    @property
    def vocabulary(self) -> int:
        return self.vocab

    @property
    def tokens(self) -> int:
        return self.length

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        device = generator.device
        inputs = torch.randint(1, self.vocab, (count, self.length), device=device, generator=generator)
        place = torch.randint(0, self.length - 2, (count, 1), device=device, generator=generator)
        inputs.scatter_(1, place, 0)
        inputs[:, -1] = 0
        targets = torch.full_like(inputs, -100)
        targets[:, -1:] = inputs.gather(1, place + 1)
        return Batch(inputs, targets)
