"""Memory slots: a working memory that tokens compete for, and a long-term memory of outer products."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, linear, rotated, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.tasks import Batch, TrainTask
from foveate.train.trial import by_seed, differences, over_seeds


@mixer("memory-slots")
class MemorySlots(Mixer):
    """Tokens write to a few slots in competition, slots go into a long-term memory, and tokens read both.

    The text goes in segments of H. After each, with W the working memory (slots, width) and L the long-term memory
    (long, slots, width):

        C = softmax(top `winners` of (W Q) [W, H] K' / sqrt(d)) [W, H] V     the write: few entries win each slot
        W = f * W + (1 - f) * tanh(C),   f = sigmoid(F [W, C])
        L_c = (1 - a_c) L_c + a_c W,     a = softmax(A mean(W))              the outer product of a and W

    A token reads what was there before its segment: u by multi-head attention over W, and u' by attention, with the
    query made of u, over all entries of L; y = W_out (h + alpha u + (1 - alpha) u'), with h attention within the
    segment and alpha a learned number.

    After the paper as its summaries have it (competition by top-k, W and L of these shapes, the two reads, alpha); the
    paper itself could not be read here. Ours: segments in the place of its steps, h, the gate f, that L forgets as much
    as it takes up, and that reads come before the write, so that no token sees a later one.

    Fields:
        slots: of the working memory.
        winners: entries that may write to a slot at once.
        long: matrices of the long-term memory; 0: there is none.
        segment: tokens between two writes.
    """

    paper = Paper(
        "Understanding AI Cognition: A Neural Module for Inference Inspired by Human Memory Mechanisms",
        2023,
        "https://arxiv.org/abs/2310.09297",
    )
    claim = "answers questions on relations better with a working and a long-term memory"

    slots: int = 8
    winners: int = 5
    long: int = 4
    segment: int = 8

    def __post_init__(self) -> None:
        if min(self.slots, self.winners, self.segment) < 1 or self.long < 0:
            raise FoveateError(f"{self}: slots, winners and segment must be at least 1, long 0 or more.")
        if self.winners > self.slots + self.segment:
            raise FoveateError(
                f"{self}: {self.winners} winners of {self.slots} slots and {self.segment} tokens can't be: give fewer."
            )

    def build(self, shape: Shape) -> TokenMixer:
        return MemorySlotsMixer(shape, self)


class MemorySlotsMixer(TokenMixer):
    def __init__(self, shape: Shape, settings: MemorySlots):
        super().__init__()
        if shape.head % 2:
            raise FoveateError(
                f"memory-slots: rotary positions need heads of an even size, not {shape.head}: give another number."
            )
        width = shape.width
        self.heads, self.width, self.settings = shape.heads, width, settings
        self.first = nn.Parameter(torch.randn(settings.slots, width))
        self.qkv = linear(width, 3 * width)
        self.writer, self.written = linear(width, width), linear(width, 2 * width)
        self.forget = linear(2 * width, width, bias=True)
        self.ask, self.working = linear(width, width), linear(width, 2 * width)
        if settings.long:
            self.spread = linear(width, settings.long)
            self.ask_long, self.stored = linear(width, width), linear(width, 2 * width)
            self.alpha = nn.Parameter(torch.zeros(()))
        self.out = linear(width, width)

    def start(self, batch: int, like: Tensor) -> State:
        dtype = torch.promote_types(like.dtype, torch.float32)
        working, long = self._empty(batch, dtype)
        return {
            "working": working.detach().clone(),
            "long": long,
            "tokens": like.new_zeros(batch, self.settings.segment, self.width),
            "seen": like.new_zeros(batch, dtype=torch.long),
        }

    def _empty(self, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        settings, first = self.settings, self.first.to(dtype)
        return first.expand(batch, -1, -1), first.new_zeros(batch, settings.long, settings.slots, self.width)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        size, dtype, begun = self.settings.segment, torch.promote_types(x.dtype, torch.float32), 0
        if state is None:
            working, long = self._empty(x.shape[0], dtype)
        else:
            # All texts of a batch are as long. The tokens of a segment that has begun are kept, and gone over again.
            begun = int(state["seen"][0]) % size
            working, long = state["working"], state["long"]
            x = torch.cat([state["tokens"][:, :begun].to(x.dtype), x], 1)
        rows = []
        pieces = x.split(size, 1)
        for i, piece in enumerate(pieces):
            rows.append(self._read(piece, working.to(x.dtype), long.to(x.dtype)))
            if piece.shape[1] == size and (state is not None or i + 1 < len(pieces)):
                working, long = self._write(piece, working, long)
        y = torch.cat(rows, 1)[:, begun:]
        if state is None:
            return self.out(y), None
        rest = x[:, x.shape[1] // size * size :]
        return self.out(y), {
            "working": working.clone(),
            "long": long.clone(),
            "tokens": functional.pad(rest, (0, 0, 0, size - rest.shape[1])),
            "seen": state["seen"] + y.shape[1],
        }

    def _read(self, x: Tensor, working: Tensor, long: Tensor) -> Tensor:
        """What tokens of a segment make of each other and of both memories, (batch, n, width)."""
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        near = attend(rotated(q), rotated(k), v).flatten(2)
        u = self._look(self.ask(x), self.working(working))
        if not self.settings.long:
            return near + u
        alpha = torch.sigmoid(self.alpha).to(u.dtype)
        return near + alpha * u + (1 - alpha) * self._look(self.ask_long(u), self.stored(long.flatten(1, 2)))

    def _look(self, q: Tensor, kv: Tensor) -> Tensor:
        """Multi-head attention of q (batch, n, width) over all entries of kv (batch, m, 2 width)."""
        k, v = split_heads(kv, 2 * self.heads).transpose(1, 2).chunk(2, 1)
        q = split_heads(q, self.heads).transpose(1, 2)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _write(self, x: Tensor, working: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
        """Both memories after a segment, in float32 at least."""
        dtype = working.dtype
        entries = torch.cat([working.to(x.dtype), x], 1)
        k, v = self.written(entries).chunk(2, -1)
        scores = (self.writer(working.to(x.dtype)) @ k.mT).to(dtype) / math.sqrt(self.width)
        least = scores.topk(self.settings.winners, -1).values[..., -1:]
        won = scores.masked_fill(scores < least, -torch.inf).softmax(-1).to(v.dtype) @ v
        kept = torch.sigmoid(self.forget(torch.cat([working.to(x.dtype), won], -1))).to(dtype)
        working = kept * working + (1 - kept) * torch.tanh(won.to(dtype))
        if self.settings.long:
            share = self.spread(working.mean(1).to(x.dtype)).to(dtype).softmax(-1)[..., None, None]
            long = (1 - share) * long + share * working.unsqueeze(1)
        return working, long


@dataclass(frozen=True, kw_only=True)
class Relations(TrainTask):
    """Sort-of-CLEVR in tokens: six objects, each of its own colour, with a shape and a place; then a question.

    An object is four tokens (colour, shape, column, row), and objects come in any order. The question is a colour and
    what is asked: its shape, whether it is in the left half, in the upper half; of relations the shape of the
    nearest object, that of the farthest, how many others have its shape.

    Fields:
        grid: columns, and rows, even.
        relational: whether only relations are asked for.
    """

    name: ClassVar[str] = "relations"
    about = "questions about objects and their relations"

    grid: int = 8
    relational: bool = False

    objects: ClassVar[int] = 6

    @property
    def vocabulary(self) -> int:
        return 6 + 2 + 2 * self.grid + 6 + 10  # colours, shapes, places, questions; answers: 2 shapes, no, yes, 0 to 5

    @property
    def tokens(self) -> int:
        return 4 * self.objects + 2

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        device, six, grid = generator.device, self.objects, self.grid
        colour = torch.rand(count, six, device=device, generator=generator).argsort(1)
        shape = torch.randint(2, (count, six), device=device, generator=generator)
        place = torch.rand(count, grid * grid, device=device, generator=generator).argsort(1)[:, :six]  # no two in one
        column, row = place % grid, place // grid
        asked = torch.randint(six, (count, 1), device=device, generator=generator)
        question = torch.randint(3 if self.relational else 0, 6, (count, 1), device=device, generator=generator)
        own = [each.gather(1, asked) for each in (shape, column, row)]
        far = (column - own[1]).square() + (row - own[2]).square()
        # The first in the text of those that are as near, or as far: less than 1 is added.
        order = torch.arange(six, device=device) / six
        nearest = (far + order).scatter(1, asked, torch.inf).argmin(1, keepdim=True)
        farthest = (far - order).scatter(1, asked, -torch.inf).argmax(1, keepdim=True)
        answers = [
            own[0],
            2 + (own[1] < grid // 2).long(),
            2 + (own[2] < grid // 2).long(),
            shape.gather(1, nearest),
            shape.gather(1, farthest),
            4 + (shape == own[0]).sum(1, keepdim=True) - 1,
        ]
        answer = torch.cat(answers, 1).gather(1, question)
        things = torch.stack([colour, 6 + shape, 8 + column, 8 + grid + row], 2).flatten(1)
        inputs = torch.cat([things, colour.gather(1, asked), 8 + 2 * grid + question], 1)
        targets = torch.full_like(inputs, -100)
        targets[:, -1:] = 14 + 2 * grid + answer
        return Batch(inputs, targets)


@claim("memory-slots")
class MemorySlotsClaim(Claim):
    statement: ClassVar[str] = (
        "with working memory and long-term memory a transformer answers questions on relations better than without"
    )
    setting: ClassVar[str] = (
        "Sort-of-CLEVR as tokens (6 objects, a question), judged on relations: 2 layers of width 64, 3 seeds, 600 "
        "steps of 128 texts each; against the same without long-term memory, and softmax attention with wider channel "
        "mixers (as many parameters)"
    )
    reads = False
    steps: int = 600
    batch: int = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64)
    times: float = 6.4

    def run(self, bench: Bench) -> Finding:
        models = {
            "both memories": replace(self.sizes, mixer="memory-slots"),
            "working memory": replace(self.sizes, mixer="memory-slots:long=0"),
            "attention": replace(self.sizes, mixer="softmax", channel=f"gated:times={self.times}"),
        }
        found = by_seed(
            Relations(),
            models,
            Settings(steps=self.steps, batch=self.batch, lr=2e-3),
            device=bench.model.device,
            seeds=self.seeds,
            judge=Relations(relational=True),
            progress=bench.progress,
        )
        gains = {name: differences(found["both memories"], found[name], "accuracy") for name in list(models)[1:]}
        sizes = {name: sum(p.numel() for p in found[name][0].model.parameters()) for name in models}
        return Finding(
            {
                **{f"accuracy, {name}": over_seeds([x.scores["accuracy"] for x in found[name]]) for name in models},
                **{f"accuracy, both memories less {name}": each for name, each in gains.items()},
                **{f"parameters, {name}": Metric.exact(float(each)) for name, each in sizes.items()},
            },
            {
                "it is more accurate than attention of its size": gains["attention"].low > 0,
                "long-term memory helps": gains["working memory"].low > 0,
            },
        )
