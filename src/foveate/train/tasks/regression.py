"""In-context linear regression: a linear function from its examples in the text, beside ridge and Bayes."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.train.tasks.base import Batch, TrainTask, train_task


@train_task("regression")
class Regression(TrainTask):
    """After "What Can Transformers Learn In-Context? A Case Study of Simple Function Classes" (arXiv 2208.01066), and,
    with a pool of functions, "Pretraining task diversity and the emergence of non-Bayesian in-context learning for
    regression" (arXiv 2306.15063).

    A text is x_1, y_1, x_2, y_2, ..., with y = w x + noise, x and w normal. At each x the y is asked for. The loss is
    the squared error over `size`, so that answering 0 loses 1 beside the noise.

    Judged beside two baselines on the same texts: `ridge`, least squares with the penalty that is best for normal w,
    and `bayes`, the best that can be: with `pool` the mean of the pool's functions by their posterior, else ridge.

    Fields:
        size: numbers of x.
        points: pairs of a text.
        noise: its standard deviation, as a multiple of sqrt(size).
        pool: functions that there are in all (in training and judging); 0: a new one for each text.
    """

    about = "a linear function from examples in the text, against ridge regression and Bayes"
    head = "values"
    better = "loss"
    higher = False

    size: int = 4
    points: int = 16
    noise: float = 0.25
    pool: int = 0

    def __post_init__(self) -> None:
        if min(self.size, self.points) < 1 or self.noise <= 0 or self.pool < 0:
            raise FoveateError(f"{self}: size and points must be at least 1, noise above 0, pool 0 or more.")

    @property
    def vocabulary(self) -> int:
        return 0

    @property
    def sizes(self) -> tuple[int, int]:
        return self.size + 1, 1

    @property
    def tokens(self) -> int:
        return 2 * self.points

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        device = generator.device
        x = torch.randn(count, self.points, self.size, device=device, generator=generator)
        if self.pool:
            chosen = torch.randint(self.pool, (count,), device=device, generator=generator)
            w = self.functions(device)[chosen]
        else:
            w = torch.randn(count, self.size, device=device, generator=generator)
        spread = self.noise * self.size**0.5
        y = torch.einsum("bpd,bd->bp", x, w) + spread * torch.randn(
            count, self.points, device=device, generator=generator
        )
        inputs = torch.zeros(count, 2 * self.points, self.size + 1, device=device)
        inputs[:, 0::2, : self.size], inputs[:, 1::2, self.size] = x, y
        targets = torch.full((count, 2 * self.points, 1), torch.nan, device=device)
        targets[:, 0::2, 0] = y
        return Batch(inputs, targets)

    def functions(self, device: torch.device) -> Tensor:
        """The pool, (pool, size)."""
        generator = torch.Generator().manual_seed(self.pool)
        return torch.randn(self.pool, self.size, generator=generator).to(device)

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`loss`, and `ridge` and `bayes`, the baselines' losses on the same texts: (batch,) each."""
        x, y = batch.inputs[:, 0::2, : self.size], batch.targets[:, 0::2, 0]
        answers = {"loss": logits[:, 0::2, 0], "ridge": self.ridge(x, y), "bayes": self.bayes(x, y)}
        return {name: (each - y).square().mean(1) / self.size for name, each in answers.items()}

    def ridge(self, x: Tensor, y: Tensor) -> Tensor:
        """What ridge regression on the pairs before each answers, (batch, points); x (batch, points, size)."""
        penalty = self.noise**2 * self.size * torch.eye(self.size, device=x.device, dtype=torch.double)
        x, y = x.double(), y.double()
        products = (x.unsqueeze(-1) * x.unsqueeze(-2)).cumsum(1) - x.unsqueeze(-1) * x.unsqueeze(-2)
        sums = (x * y.unsqueeze(-1)).cumsum(1) - x * y.unsqueeze(-1)
        w = torch.linalg.solve(products + penalty, sums.unsqueeze(-1)).squeeze(-1)
        return (w * x).sum(-1).to(torch.float32)

    def bayes(self, x: Tensor, y: Tensor) -> Tensor:
        """The posterior mean of each answer given the pairs before it, (batch, points)."""
        if not self.pool:
            return self.ridge(x, y)  # with normal w and noise they are the same
        said = torch.einsum("bpd,md->bpm", x, self.functions(x.device))
        misses = (said - y.unsqueeze(-1)).square()
        before = misses.cumsum(1) - misses
        weights = (-before / (2 * self.noise**2 * self.size)).softmax(-1)
        return (weights * said).sum(-1)
