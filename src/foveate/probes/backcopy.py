"""Bigram-Backcopy: a task so small that it can be seen how attention sinks arise, and models that are trained on it.

Not a probe: what the claim of `sinks` is tried on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from foveate.errors import FoveateError

BEGIN = 0
"""The token that every sequence begins with."""


@dataclass(frozen=True)
class Backcopy:
    """Characters that follow each other as in a text, but for a few triggers: what stood before one is copied after it.

    After a character that is no trigger comes what the text's bigrams say. After a trigger comes the character that
    stood before it. So a head that looks at the token before has to act at triggers, and to keep still elsewhere.

    Args:
        text: where the bigrams come from. (The paper takes Shakespeare.)
        vocab: tokens, the begin token among them: the most frequent characters.
        triggers: how many of the most frequent characters are triggers.

    Raises:
        FoveateError: a text of too few different characters.

    Source: Active-Dormant Attention Heads (2024): 64 tokens, 3 triggers, the most frequent characters.

    Example:
        >>> task = Backcopy("to be or not to be, that is the question " * 5, vocab=12, triggers=1)
        >>> rows = task.draw(4, 16, seed=0)
        >>> at = (rows[:, 2:-1] == 1)                       # a blank is the most frequent character, token 1
        >>> torch.equal(rows[:, 3:][at], rows[:, 1:-2][at])
        True
    """

    text: str = field(repr=False)
    vocab: int = 64
    triggers: int = 3
    next: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        often = [c for c, _ in Counter(self.text).most_common(self.vocab - 1)]
        if len(often) < self.vocab - 1 or not 1 <= self.triggers < len(often):
            raise FoveateError(
                f"Bigram-Backcopy of {self.vocab} tokens and {self.triggers} triggers needs a text of {self.vocab - 1} "
                f"different characters, more than triggers: this one has {len(often)}. Ask for fewer."
            )
        at = {c: i + 1 for i, c in enumerate(often)}
        counts = torch.zeros(self.vocab, self.vocab)
        for (a, b), count in Counter(zip(self.text, self.text[1:], strict=False)).items():
            if a in at and b in at:
                counts[at[a], at[b]] += count
        counts[BEGIN] = counts.sum(0)
        counts[BEGIN, 1 : self.triggers + 1] = 0  # a sequence begins with something that can be copied
        counts[counts.sum(1) == 0, -1] = 1
        object.__setattr__(self, "next", counts / counts.sum(1, keepdim=True))

    def is_trigger(self, ids: Tensor) -> Tensor:
        """Which tokens are triggers."""
        return (ids >= 1) & (ids <= self.triggers)

    def draw(self, count: int, length: int, seed: int) -> Tensor:
        """Sequences that begin with the begin token: LongTensor (count, length)."""
        generator = torch.Generator().manual_seed(seed)
        chances = self.next.cumsum(1)
        drawn = torch.rand(length, count, generator=generator)
        rows = torch.full((count, length), BEGIN)
        for i in range(1, length):
            now = rows[:, i - 1]
            new = torch.searchsorted(chances[now], drawn[i][:, None])[:, 0].clamp(max=self.vocab - 1)
            rows[:, i] = torch.where(self.is_trigger(now), rows[:, i - 2], new)
        return rows

    def least(self, ids: Tensor) -> float:
        """The loss of a model that knows the task, in nats a token, over the tokens after the first that is drawn."""
        now, new = ids[:, 1:-1], ids[:, 2:]
        nats = -self.next[now, new].clamp(min=1e-30).log()
        return float(nats.masked_fill(self.is_trigger(now), 0.0).mean())


@dataclass(frozen=True)
class Shape:
    """A model for the task: `layers` of one head and an MLP, `width` channels, norms before each sublayer.

    Attributes:
        relu: attention weights are relu(logit) / (tokens seen) in the place of a softmax.
        sgd: trained by gradient descent with momentum 0.9 in the place of Adam.
        lr: learning rate; the paper's for Adam is 3e-4, for gradient descent 0.03.
    """

    layers: int = 1
    width: int = 64
    relu: bool = False
    sgd: bool = False
    lr: float = 3e-3


@dataclass(frozen=True)
class Inside:
    """What stands inside the models of all seeds for some sequences, (seed, row, token, ...).

    Attributes:
        logits: (seed, row, token, vocab).
        weights: of each layer, (seed, row, query, entry).
        values: of each layer, (seed, row, token, width).
        residual: after each layer, (seed, row, token, width).
    """

    logits: Tensor
    weights: list[Tensor]
    values: list[Tensor]
    residual: list[Tensor]


class Models:
    """Models of one shape, one for each seed, side by side in the same tensors: they train as fast as one.

    Args:
        shape: what they are.
        vocab, length: tokens, and positions.
        seeds: what their weights are drawn by.
        device: where.

    Example:
        >>> task = Backcopy("to be or not to be, that is the question " * 5, vocab=12, triggers=1)
        >>> models = Models(Shape(width=16), task.vocab, 16, seeds=[0, 1])
        >>> models.look(task.draw(3, 16, seed=0).expand(2, 3, 16)).logits.shape
        torch.Size([2, 3, 16, 12])
    """

    def __init__(self, shape: Shape, vocab: int, length: int, seeds: list[int], device: torch.device | str = "cpu"):
        self.shape, self.length, self.seeds = shape, length, seeds
        d = shape.width
        sizes = {"token": (vocab, d), "position": (length, d), "out": (d, vocab)}
        for i in range(shape.layers):
            sizes |= {f"{i}.{name}": (d, d) for name in "qkvo"} | {f"{i}.up": (d, 4 * d), f"{i}.down": (4 * d, d)}
        self.weights = {}
        for name, size in sizes.items():
            drawn = [torch.randn(size, generator=torch.Generator().manual_seed(hash_of(name, seed))) for seed in seeds]
            # As large as PyTorch's Embedding and Linear draw theirs.
            scale = 1.0 if name in ("token", "position") else (3 * size[0]) ** -0.5
            self.weights[name] = torch.stack(drawn).mul(scale).to(device).requires_grad_()
        for name in [f"{i}.{part}" for i in range(shape.layers) for part in ("norm1", "norm2")] + ["norm"]:
            self.weights[name] = torch.ones(len(seeds), 1, 1, d, device=device, requires_grad=True)

    def look(self, ids: Tensor) -> Inside:
        """Read sequences, LongTensor (seed, row, token): each seed its own."""
        w, d = self.weights, self.shape.width
        count, rows, length = ids.shape
        flat = ids.reshape(count, -1, 1).expand(-1, -1, d)
        x = w["token"].gather(1, flat).view(count, rows, length, d) + w["position"][:, None, :length]
        seen = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        found = Inside(x, [], [], [])
        for i in range(self.shape.layers):
            y = self._norm(x, f"{i}.norm1")
            q, k, v = (self._map(y, f"{i}.{name}") for name in "qkv")
            logits = q @ k.transpose(-1, -2) / math.sqrt(d)
            if self.shape.relu:
                weights = logits.relu().masked_fill(~seen, 0.0) / seen.sum(-1, keepdim=True)
            else:
                weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            x = x + self._map(weights @ v, f"{i}.o")
            x = x + self._map(self._map(self._norm(x, f"{i}.norm2"), f"{i}.up").relu(), f"{i}.down")
            found.weights.append(weights)
            found.values.append(v)
            found.residual.append(x)
        return Inside(self._map(self._norm(x, "norm"), "out"), found.weights, found.values, found.residual)

    def train(
        self, rows: Tensor, steps: int, batch: int, progress: Callable[[float], None] = lambda done: None
    ) -> Tensor:
        """Train on sequences, LongTensor (row, token), drawn anew for each seed and step.

        Returns:
            The last losses, (seed,), in nats a token.
        """
        shape, device = self.shape, self.weights["out"].device
        parameters = list(self.weights.values())
        optimizer: torch.optim.Optimizer
        if shape.sgd:
            optimizer = torch.optim.SGD(parameters, lr=shape.lr, momentum=0.9)
        else:
            optimizer = torch.optim.Adam(parameters, lr=shape.lr, betas=(0.9, 0.99))
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        rows = rows.to(device)
        losses = torch.zeros(len(self.seeds))
        with torch.enable_grad():
            for step in range(steps):
                which = torch.stack([torch.randint(len(rows), (batch,), generator=g) for g in generators])
                ids = rows[which.to(device)]
                losses = self.losses(ids)
                gradients = torch.autograd.grad(losses.sum(), parameters)  # of a sum: each seed has its own
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                if step % 50 == 0:
                    progress(step / steps)
        return losses.detach().cpu()

    def losses(self, ids: Tensor) -> Tensor:
        """Mean loss of each seed, in nats a token, over the tokens after the first that is drawn; ids as in `look`."""
        logits = self.look(ids).logits[:, :, 1:-1]
        nats = functional.cross_entropy(logits.flatten(0, 2), ids[:, :, 2:].flatten(), reduction="none")
        return nats.view(len(self.seeds), -1).mean(1)

    def _map(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[name][:, None]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:]) * self.weights[name]


def hash_of(name: str, seed: int) -> int:
    """A seed of its own for each weight of each model."""
    return (sum((i + 1) * ord(c) for i, c in enumerate(name)) * 7919 + seed * 104729) % (1 << 31)


@dataclass(frozen=True)
class Extremes:
    """What the first token is to models, each (seed,) of the layer where it is strongest.

    Attributes:
        sink: of the attention at tokens that are no triggers, the share that the first token receives.
        active: the same at triggers.
        drain: the norm of its value over the median of the others', in the layer of the strongest sink.
        peak: the norm of its residual stream over the median of the others', highest over the layers.
        above: the loss less that of a model that knows the task, nats a token.
    """

    sink: Tensor
    active: Tensor
    drain: Tensor
    peak: Tensor
    above: Tensor


@torch.no_grad()
def extremes(task: Backcopy, models: Models, rows: Tensor) -> Extremes:
    """What the first token is to models, on sequences (row, token) that they were not trained on.

    With ReLU attention a row can be all zero: nothing of that goes to the first token.
    """
    count = len(models.seeds)
    ids = rows.to(models.weights["out"].device).expand(count, -1, -1)
    inside = models.look(ids)
    late = torch.arange(rows.shape[1], device=ids.device) >= 8  # the first few see little else than the first token
    triggers = task.is_trigger(ids)
    sinks, actives, drains, peaks = [], [], [], []
    for weights, values, residual in zip(inside.weights, inside.values, inside.residual, strict=True):
        share = weights[..., 0] / weights.sum(-1).clamp(min=1e-9)
        sinks.append(_mean(share, ~triggers & late))
        actives.append(_mean(share, triggers & late))
        drains.append(_over_median(values))
        peaks.append(_over_median(residual))
    sink = torch.stack(sinks)
    best = sink.argmax(0)[None]
    return Extremes(
        sink.gather(0, best)[0].cpu(),
        torch.stack(actives).gather(0, best)[0].cpu(),
        torch.stack(drains).gather(0, best)[0].cpu(),
        torch.stack(peaks).amax(0).cpu(),
        models.losses(ids).cpu() - task.least(rows),
    )


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).flatten(1).sum(1) / where.flatten(1).sum(1)


def _over_median(states: Tensor) -> Tensor:
    """Norm at the first token over the median norm of the others: (seed, row, token, width) to (seed,)."""
    norms = states.norm(dim=-1)
    return norms[:, :, 0].mean(1) / norms[:, :, 1:].flatten(1).median(1).values
