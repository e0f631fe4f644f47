"""Relative self-attention (Music Transformer): logits that know how far back a token is, by skewing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Backbone, Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import cached, linear, split_heads, visible
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes, build
from foveate.train.loop import Settings, fit
from foveate.train.show import Show
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import over_seeds


@mixer("relative")
class Relative(Mixer):
    """Softmax attention whose logits have a learned term of the distance, head by head:

        softmax((Q K^T + S) / sqrt(d)) V,   S[i, j] = q_i . e[i - j]

    with one vector e of a head's size for each distance. The plain way gathers e[i - j] for all pairs, a tensor of
    n x n x d. Here Q is multiplied with the n vectors in order of falling distance, and the result is skewed: padded by
    a column on the left, read row after row, without its first n numbers, and cut into rows anew. That moves row i by i
    places, so that distances line up with keys, and the vectors take n x d. (The logits themselves stay n x n.)

    Ours: the paper has a vector for every distance of a training example; here those from `distance` - 1 on share the
    last, so that texts may be longer than those learned. With a state, n new queries meet more keys than n, which the
    same skewing does. There are no other positions.

    Fields:
        distance: how many distances, from 0 on, have a vector of their own.
    """

    paper = Paper("Music Transformer", 2018, "https://arxiv.org/abs/1809.04281")
    claim = (
        "has relative positions whose memory is linear in the length, and learns repetition better than absolute ones"
    )
    grows = True

    distance: int = 128

    def __post_init__(self) -> None:
        if self.distance < 1:
            raise FoveateError(f"{self}: distance must be 1 or more, as a token sees itself at distance 0.")

    def build(self, shape: Shape) -> TokenMixer:
        return RelativeMixer(shape, self.distance)


class RelativeMixer(TokenMixer):
    """Args: the shape; how many distances have a vector of their own."""

    def __init__(self, shape: Shape, distance: int):
        super().__init__()
        self.heads, self.head = shape.heads, shape.head
        self.qkv = linear(shape.width, 3 * shape.width)
        self.distances = nn.Parameter(torch.randn(shape.heads, distance, shape.head) / math.sqrt(shape.head))
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        empty = like.new_zeros(batch, 0, self.heads, self.head)
        return {"keys": empty, "values": empty, "seen": like.new_zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        if state is not None:
            held, state = cached(state, keys=k, values=v)
            k, v = held["keys"], held["values"]
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        n, total = q.shape[2], k.shape[2]
        logits = q @ k.mT + skewed(q, self.distances.to(q.dtype), total)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / math.sqrt(self.head)
        logits = logits.masked_fill(~visible(n, total - n, device=x.device), -math.inf)
        y = logits.softmax(-1).to(v.dtype) @ v
        return self.out(y.transpose(1, 2).flatten(2)), state


def skewed(q: Tensor, distances: Tensor, total: int) -> Tensor:
    """The relative logits of the last n of `total` tokens; what is right of the diagonal means nothing.

    Args:
        q: (batch, heads, n, d).
        distances: (heads, own, d): vectors of the distances 0, 1, ...; the last is that of all further ones.

    Returns:
        (batch, heads, n, total).

    Example:
        >>> q, e = torch.randn(1, 2, 3, 4), torch.randn(2, 8, 4)
        >>> torch.allclose(skewed(q, e, 5)[0, 1, 0, 2], q[0, 1, 0] @ e[1, 0])   # the first query is token 2
        True
    """
    falling = torch.arange(total - 1, -1, -1, device=q.device).clamp_max(distances.shape[1] - 1)
    n, products = q.shape[2], q @ distances[:, falling].mT
    return functional.pad(products, (1, 0)).flatten(2)[..., n:].unflatten(2, (n, total))


def gathered(q: Tensor, distances: Tensor, total: int) -> Tensor:
    """What `skewed` is, the plain way: a vector for each pair of tokens. For claims and tests."""
    n = q.shape[2]
    back = torch.arange(total - n, total, device=q.device)[:, None] - torch.arange(total, device=q.device)
    vectors = distances[:, back.clamp(0, distances.shape[1] - 1)]
    return (q.unsqueeze(3) * vectors).sum(-1)


@claim("relative")
class RelativePositionsForRepetition(Claim):
    statement: ClassVar[str] = (
        "skewing gives the relative logits exactly, with memory for the relative term that is linear in the length and "
        "not quadratic; and such attention predicts sequences with much repetition better than attention with absolute "
        "positions, beyond the length that was learned as well"
    )
    setting: ClassVar[str] = (
        "the paper's is music; here two layers of width 64 learn the next byte of prose and code in passages of 128, "
        "with relative positions (vectors for 128 distances), absolute sinusoids added to the embeddings (scaled to "
        "their size), and no positions, and are judged on passages of 128 and of 256; 3 seeds, 700 steps of 64 "
        "passages. Exactness in float64, memory by the bytes of all tensors that the relative term makes"
    )
    reads: ClassVar[bool] = False
    steps: int = 700
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64)
    length: int = 128

    def run(self, bench: Bench) -> Finding:
        names = {"relative": f"relative:distance={self.length}"}
        names |= dict.fromkeys(("absolute", "no positions"), "softmax:positions=none")
        losses: dict[tuple[str, int], list[float]] = {}
        lengths = (self.length, 2 * self.length)
        for i, seed in enumerate(self.seeds):
            for j, (name, text) in enumerate(names.items()):
                model = self.model(text, name == "absolute", seed).to(bench.model.device)  # type: ignore[arg-type]
                task = TRAIN_TASKS.parse(f"lm:length={self.length}")
                fit(model, task, Settings(steps=self.steps, lr=3e-3, seed=seed), show=Show(False))
                for length in lengths:
                    judged = TRAIN_TASKS.parse(f"lm:length={length}").judge(model, count=256)
                    losses.setdefault((name, length), []).append(judged["loss"].value)
                bench.progress((i * len(names) + j + 1) / (len(names) * len(self.seeds)))
        metrics = {f"loss at {length}, {name}": over_seeds(losses[name, length]) for name, length in losses}
        checks = {}
        for length in lengths:
            pairs = zip(losses["relative", length], losses["absolute", length], strict=True)
            gap = over_seeds([a - b for a, b in pairs])
            metrics[f"loss at {length}, relative less absolute"] = gap
            checks[f"relative positions are better than absolute ones at {length}"] = gap.high < 0
        checks["skewing gives what gathering gives"] = self.apart() < 1e-9
        grown = {how.__name__: made(how, 256) / made(how, 128) for how in (skewed, gathered)}
        checks["of what the term makes beside its logits, skewing doubles with the length, gathering quadruples"] = (
            grown["skewed"] <= 2.01 and grown["gathered"] > 3.9
        )
        return Finding(metrics, checks)

    def model(self, text: str, sinusoids: bool, seed: int) -> Backbone:
        model = build(TRAIN_TASKS.parse("lm"), replace(self.sizes, mixer=text), seed=seed)
        if sinusoids:
            half = self.sizes.width // 2

            def add(module: nn.Module, given: tuple[Tensor, ...], x: Tensor) -> Tensor:
                rates = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
                angles = torch.arange(x.shape[1], device=x.device)[:, None] * rates
                return x + 0.02 * math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)

            model.embed.register_forward_hook(add)  # type: ignore[union-attr]
        return model

    def apart(self) -> float:
        """The largest difference between the two ways, over pairs that attention sees."""
        generator = torch.Generator().manual_seed(0)
        q, e = (torch.randn(*sizes, 8, dtype=torch.double, generator=generator) for sizes in ((2, 4, 9), (4, 6)))
        seen = visible(9, 5)
        return float(((skewed(q, e, 14) - gathered(q, e, 14)) * seen).abs().max())


def made(how: object, length: int) -> int:
    """Elements of the tensors of vectors (size 32) that a way to the relative logits makes, its logits left out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    storages: dict[int, Tensor] = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            got = func(*args, **(kwargs or {}))
            if isinstance(got, Tensor) and got.is_floating_point() and got.shape[-1] == 32:
                storages[got.untyped_storage().data_ptr()] = got  # held, so that no address comes twice
            return got

    q, e = torch.randn(1, 1, length, 32), torch.randn(1, length, 32)
    with Counting():
        how(q, e, length)  # type: ignore[operator]
    given = {each.untyped_storage().data_ptr() for each in (q, e)}
    return sum(each.untyped_storage().nbytes() // 4 for at, each in storages.items() if at not in given)
