"""Multi-query associative recall: key-value pairs first, then keys whose values are asked for."""

from __future__ import annotations

import torch

from foveate.errors import FoveateError
from foveate.train.tasks.base import Batch, TrainTask, train_task


@train_task("mqar")
class Mqar(TrainTask):
    """After "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv 2312.04927, section 4).

    A text begins with `pairs` key-value pairs. After that each key comes once more, at places that are the likelier the
    nearer they are, and its value is asked for; all other tokens are 0. Keys are of the vocabulary's lower half, values
    of its upper half, and a text has each key once.

    Fields:
        pairs: key-value pairs of a text.
        length: tokens of a text, even, at least 4 times the pairs.
        vocab: tokens, 0 among them.
        power: the power law of the distance at which a key comes again; lower is nearer. 1: all are as likely.
    """

    about = "recall of values by their keys: what attention can and a fixed state can't"

    pairs: int = 8
    length: int = 64
    vocab: int = 256
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.length < 4 * self.pairs or self.length % 2 or self.pairs < 1:
            raise FoveateError(
                f"{self}: {self.pairs} pairs and as many questions need an even length of {4 * self.pairs} or more."
            )
        if self.vocab < 2 * self.pairs + 3:
            raise FoveateError(
                f"{self}: {self.pairs} keys need a vocab of {2 * self.pairs + 3} or more: half of it are keys."
            )

    @property
    def vocabulary(self) -> int:
        return self.vocab

    @property
    def tokens(self) -> int:
        return self.length

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        device, half = generator.device, self.vocab // 2
        order = torch.rand(count, half - 1, device=device, generator=generator).argsort(1)
        keys = 1 + order[:, : self.pairs]
        values = torch.randint(half, self.vocab, (count, self.pairs), device=device, generator=generator)
        inputs = torch.zeros(count, self.length, dtype=torch.long, device=device)
        targets = torch.full_like(inputs, -100)
        inputs[:, 0 : 2 * self.pairs : 2], inputs[:, 1 : 2 * self.pairs : 2] = keys, values
        places = (self.length - 2 * self.pairs) // 2
        likely = torch.arange(1, places + 1, device=device, dtype=torch.float) ** (self.power - 1)
        gaps = torch.multinomial(likely.expand(count, -1), self.pairs, generator=generator)
        at = 2 * self.pairs + 2 * gaps
        return Batch(inputs.scatter(1, at, keys), targets.scatter(1, at, values))
