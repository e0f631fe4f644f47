"""Search in a directed graph: the first step on the way to a goal, several steps ahead."""

from __future__ import annotations

import torch

from foveate.errors import FoveateError
from foveate.train.tasks.base import Batch, TrainTask, train_task


@train_task("dag-search")
class DagSearch(TrainTask):
    """After "Transformers Struggle to Learn to Search" (arXiv 2412.04703).

    A text is the edges of a directed graph without cycles, in random order and with random names, then a start and a
    goal; asked for is the vertex after the start on the way to the goal. From the start lead `branches` paths of the
    same length, of which one ends at the goal, so that only looking `ahead` steps tells them apart. Other edges come
    from vertices that can't be reached.

    Fields:
        ahead: edges from start to goal.
        branches: paths from the start; answering any of them is right once in `branches`.
        others: edges beside the paths.
        names: vertices that there are names for.
    """

    about = "the first step on the way to a goal: search, with its depth as the dial"

    ahead: int = 3
    branches: int = 2
    others: int = 4
    names: int = 24

    def __post_init__(self) -> None:
        if min(self.ahead, self.branches) < 1 or self.others < 0:
            raise FoveateError(f"{self}: ahead and branches must be at least 1, others 0 or more.")
        needed = 1 + self.ahead * self.branches + (1 if self.others else 0)
        if self.names < needed:
            raise FoveateError(f"{self}: its paths need {needed} vertices: give names={needed} or more.")

    @property
    def vocabulary(self) -> int:
        return 2 + self.names

    @property
    def tokens(self) -> int:
        return 3 * (self.ahead * self.branches + self.others) + 3

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        device, on_paths = generator.device, 1 + self.ahead * self.branches

        def random(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, device=device, generator=generator)

        names = 2 + random(count, self.names).argsort(1)  # 0 parts edges, 1 asks
        # Vertex 0 is the start; vertex 1 + branch * ahead + step is on a path.
        steps = torch.arange(1, on_paths, device=device).view(self.branches, self.ahead)
        before = torch.cat([torch.zeros_like(steps[:, :1]), steps[:, :-1]], 1)
        tails = before.flatten().expand(count, -1)
        heads = steps.flatten().expand(count, -1)
        if self.others:
            # From a vertex that no path has, to any vertex before it in a fixed order: no cycle, and no way there.
            tail = on_paths + (random(count, self.others) * (self.names - on_paths)).long()
            head = (random(count, self.others) * tail).long()
            tails, heads = torch.cat([tails, tail], 1), torch.cat([heads, head], 1)
        order = random(count, tails.shape[1]).argsort(1)
        edges = torch.stack([names.gather(1, tails), names.gather(1, heads)], -1)
        edges = edges.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
        body = torch.cat([torch.zeros_like(edges[..., :1]), edges], -1).flatten(1)
        # Names are random, so that the first path may always be the one that ends at the goal.
        ask = torch.stack([torch.ones_like(names[:, 0]), names[:, self.ahead], names[:, 0]], 1)
        inputs = torch.cat([body, ask], 1)
        targets = torch.full_like(inputs, -100)
        targets[:, -1] = names[:, 1]
        return Batch(inputs, targets)
