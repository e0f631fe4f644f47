"""Selective copying: repeat the tokens that are not noise, in their order."""

from __future__ import annotations

import torch

from foveate.errors import FoveateError
from foveate.train.tasks.base import Batch, TrainTask, train_task


@train_task("selective-copying")
class SelectiveCopying(TrainTask):
    """After "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752, section 3.1).

    A text holds `items` data tokens at random places among noise, then as many copies of a mark, at each of which the
    next data token is asked for. Where they stand changes from text to text, so that a filter that is the same at all
    times can't solve it.

    Fields:
        items: data tokens.
        length: tokens before the marks, data and noise.
        vocab: tokens: one noise, one mark, the others data.
    """

    about = "repeating what was no noise: what a recurrence that doesn't select can't"

    items: int = 8
    length: int = 64
    vocab: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.items <= self.length or self.vocab < 4:
            raise FoveateError(f"{self}: items must be from 1 to length, and vocab 4 or more.")

    @property
    def vocabulary(self) -> int:
        return self.vocab

    @property
    def tokens(self) -> int:
        return self.length + self.items

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        device = generator.device
        data = torch.randint(2, self.vocab, (count, self.items), device=device, generator=generator)
        places = torch.rand(count, self.length, device=device, generator=generator).argsort(1)[:, : self.items]
        inputs = torch.zeros(count, self.length, dtype=torch.long, device=device)
        inputs = inputs.scatter(1, places.sort(1).values, data)
        targets = torch.full_like(inputs, -100)
        return Batch(torch.cat([inputs, torch.ones_like(data)], 1), torch.cat([targets, data], 1))
