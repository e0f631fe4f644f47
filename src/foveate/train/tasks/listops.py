"""ListOps: the value of a nested expression of small operations on digits."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import torch

from foveate.errors import FoveateError
from foveate.train.tasks.base import Batch, TrainTask, train_task

BLANK, CLOSE, DIGIT = 0, 1, 2
OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "min": min,
    "max": max,
    "median": lambda values: int(statistics.median_low(values)),
    "sum": lambda values: sum(values) % 10,
}
OPEN = 12
"""The first operation's token; the others follow in the order of `OPERATIONS`. An operation opens its own bracket."""


@train_task("listops")
class ListOps(TrainTask):
    """After "ListOps: A Diagnostic Dataset for Latent Tree Learning" (arXiv 1804.06028).

    An expression such as `[max 2 [min 7 3] 0]` stands at the end of a text, after blanks; its value, a digit, is the
    text's class. Operations are min, max, the lower median, and the sum modulo 10.

    Fields:
        depth: operations within one another, at most.
        arguments: of an operation, at most; at least 2.
        length: tokens of a text. Longer expressions are not drawn.
    """

    about = "the value of a nested expression: structure that no single token shows"
    head = "classes"

    depth: int = 3
    arguments: int = 4
    length: int = 64

    def __post_init__(self) -> None:
        if self.depth < 1 or self.arguments < 2 or self.length < 2 + self.arguments:
            raise FoveateError(
                f"{self}: depth must be at least 1, arguments at least 2, and length at least 2 more than arguments."
            )

    @property
    def vocabulary(self) -> int:
        return OPEN + len(OPERATIONS)

    @property
    def sizes(self) -> tuple[int, int]:
        return 0, 10

    @property
    def tokens(self) -> int:
        return self.length

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
        source = random.Random(seed)
        rows: list[list[int]] = []
        values: list[int] = []
        while len(rows) < count:
            tokens, value = self._expression(source, self.depth)
            if len(tokens) <= self.length:
                rows.append([BLANK] * (self.length - len(tokens)) + tokens)
                values.append(value)
        return Batch(torch.tensor(rows, device=generator.device), torch.tensor(values, device=generator.device))

    def _expression(self, source: random.Random, depth: int) -> tuple[list[int], int]:
        """An operation with its arguments: tokens, and value. The deepest chain has all the depth that is left."""
        index = source.randrange(len(OPERATIONS))
        count = source.randint(2, self.arguments)
        nested = source.randrange(count)  # one argument goes on, so that depth is a dial and no accident
        tokens, values = [OPEN + index], []
        for each in range(count):
            if depth > 1 and (each == nested or source.random() < 0.25):
                inner, value = self._expression(source, depth - 1)
                tokens += inner
            else:
                value = source.randrange(10)
                tokens.append(DIGIT + value)
            values.append(value)
        return [*tokens, CLOSE], list(OPERATIONS.values())[index](values)


def value_of(tokens: list[int]) -> int:
    """The value of an expression's tokens, blanks left out: the definition, for tests.

    Example:
        >>> value_of([13, DIGIT + 2, 12, DIGIT + 7, DIGIT + 3, CLOSE, DIGIT + 0, CLOSE])   # [max 2 [min 7 3] 0]
        3
    """
    stack: list[list[int]] = [[]]
    operations: list[int] = []
    for token in tokens:
        if token >= OPEN:
            operations.append(token - OPEN)
            stack.append([])
        elif token >= DIGIT:
            stack[-1].append(token - DIGIT)
        elif token == CLOSE:
            stack[-2].append(list(OPERATIONS.values())[operations.pop()](stack.pop()))
    return stack[0][0]
