"""Block Transformer: the first layers see blocks of tokens, the rest see the tokens of one block."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.backbone import Backbone, Order, Shape, Stack, stack
from foveate.backbone.parts import linear
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes
from foveate.train.trial import by_seed, differences, held_bytes, over_seeds

ROWS = 2**15
"""Blocks that are worked on at once: kernels of attention take batches of less than 65,536."""


@stack("block-to-local")
class BlockToLocal(Stack):
    """Global first, then local: `block` tokens x make a block embedding, e_b = W_e [x_1, .., x_block]; the lower layers
    run causally over e_1, e_2, ..; their output c_b is the context of the next block; the upper layers run within that
    block alone, over P c_b, which are `prefix` tokens, and the block's tokens but its last.

    What a prefix gives is the first guess in a block, and so stands at the token before it, the last of the block
    before. So a token sees all tokens up to itself: those of whole blocks through contexts, the others as they are.

    Only whole blocks are held by the lower layers' state, and only the current block by the upper layers', so that the
    state is smaller by about twice `block`, and most of what is held need not be read at a token.

    Ours: W_e is a full matrix on the model's embeddings, where the paper joins embeddings of a block-th of the width;
    the first block's context is learned. With `output_hidden_states` layers show what they worked on: blocks, or tokens
    of blocks that stand in the batch.

    Fields:
        block: tokens of a block.
        prefix: tokens that a context becomes.
        lower: layers that run over blocks; 0: half of them.
    """

    paper = Paper(
        "Block Transformer: Global-to-Local Language Modeling for Fast Inference",
        2024,
        "https://arxiv.org/abs/2406.02657",
    )
    claim = "generates many times faster than a plain stack that predicts as well"

    block: int = 4
    prefix: int = 2
    lower: int = 0

    def __post_init__(self) -> None:
        if self.block < 2 or self.prefix < 1 or self.lower < 0:
            raise FoveateError(f"{self}: block must be 2 or more, prefix 1 or more, lower 0 or more.")

    def build(self, shape: Shape) -> Order:
        lower = self.lower or shape.layers // 2
        if not 0 < lower < shape.layers:
            raise FoveateError(
                f"block-to-local: of {shape.layers} layers {lower} can't be the lower ones, as some must run over "
                "blocks and some within them: give a model of 2 layers or more, and a lower number of lower layers."
            )
        return BlockToLocalOrder(shape.width, self.block, self.prefix, lower)


class BlockToLocalOrder(Order):
    """Args: the width; tokens of a block; prefix tokens; how many layers run over blocks.

    The state is each layer's by its number, and `block`: the embeddings of the current block's tokens, (batch, fewer
    than `block`, width).
    """

    def __init__(self, width: int, block: int, prefix: int, lower: int):
        super().__init__()
        self.block, self.prefix, self.lower = block, prefix, lower
        self.embed = linear(block * width, width)
        self.first = nn.Parameter(0.02 * torch.randn(width))
        self.expand = linear(width, prefix * width)

    def start(self, layers: nn.ModuleList, batch: int, like: Tensor) -> dict[str, Any]:
        state = super().start(layers, batch, like)
        prefix = self._prefixes(self.first.to(like.dtype).expand(batch, 1, -1)).flatten(1, 2)
        _, local = self._through(layers, self._upper(layers), prefix, state)
        return {**state, **local, "block": {"tokens": like[:, :0].clone()}}

    def forward(
        self, x: Tensor, layers: nn.ModuleList, state: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any] | None]:
        if state is not None:
            return self._further(x, layers, state)
        n, whole = x.shape[1], x.shape[1] // self.block
        contexts = self.first.to(x.dtype).expand(x.shape[0], 1, -1)
        if whole:
            later, _ = self._contexts(x[:, : whole * self.block], layers, None)
            contexts = torch.cat([contexts, later], 1)
        tokens = nn.functional.pad(x, (0, 0, 0, (whole + 1) * self.block - n)).unflatten(1, (whole + 1, self.block))
        y = self._folded(contexts, tokens, layers)
        return y[:, 1 : n + 1], None  # the first stands before the first token

    def _further(self, x: Tensor, layers: nn.ModuleList, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        upper, held = self._upper(layers), state["block"]["tokens"]
        tokens, free = torch.cat([held.to(x.dtype), x], 1), self.block - 1 - held.shape[1]
        whole = tokens.shape[1] // self.block
        after, rows = {**state}, []
        if free:  # the last token of a block is not read within it
            y, local = self._through(layers, upper, x[:, :free], state)
            rows.append(y)
            after.update(local)
        if whole:
            contexts, lower = self._contexts(tokens[:, : whole * self.block], layers, state)
            after.update(lower)
            if whole > 1:
                inner = tokens[:, self.block : whole * self.block].unflatten(1, (whole - 1, self.block))
                rows.append(self._folded(contexts[:, :-1], inner, layers))
            begun = torch.cat([self._prefixes(contexts[:, -1:]).flatten(1, 2), tokens[:, whole * self.block :]], 1)
            fresh = {i: layers[int(i)].start(x.shape[0], x) for i in upper}  # type: ignore[operator]
            y, local = self._through(layers, upper, begun, fresh)
            rows.append(y[:, self.prefix - 1 :])
            after.update(local)
        after["block"] = {"tokens": tokens[:, whole * self.block :].clone()}
        return torch.cat(rows, 1), after

    def _upper(self, layers: nn.ModuleList) -> list[str]:
        return [str(i) for i in range(self.lower, len(layers))]

    def _contexts(
        self, tokens: Tensor, layers: nn.ModuleList, state: dict[str, Any] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """What whole blocks give to the blocks after them: (batch, blocks * block, width) to (batch, blocks, width)."""
        blocks = tokens.unflatten(1, (-1, self.block)).flatten(2)
        lower = [str(i) for i in range(self.lower)]
        contexts, after = self._through(layers, lower, self.embed(blocks).to(tokens.dtype), state)
        return contexts.to(tokens.dtype), after

    def _prefixes(self, contexts: Tensor) -> Tensor:
        """(batch, blocks, width) to (batch, blocks, prefix, width)."""
        return self.expand(contexts).to(contexts.dtype).unflatten(-1, (self.prefix, -1))

    def _folded(self, contexts: Tensor, tokens: Tensor, layers: nn.ModuleList) -> Tensor:
        """What whole blocks come to, all at once, as rows of the batch.

        Args:
            contexts: (batch, blocks, width).
            tokens: (batch, blocks, block, width); the last of each is not read.

        Returns:
            (batch, blocks * block, width), each a guess of the token there.
        """
        inner = torch.cat([self._prefixes(contexts), tokens[:, :, :-1]], 2)
        parts = [self._through(layers, self._upper(layers), part, None)[0] for part in inner.flatten(0, 1).split(ROWS)]
        y = torch.cat(parts)
        return y[:, self.prefix - 1 :].unflatten(0, contexts.shape[:2]).flatten(1, 2)

    def _through(
        self, layers: nn.ModuleList, names: list[str], x: Tensor, state: dict[str, Any] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Through the layers of these numbers, and their states."""
        after = {}
        for name in names:
            x, after[name] = layers[int(name)](x, None if state is None else state[name])
        return x, after


@claim("block-to-local")
class BlockToLocalClaim(Claim):
    statement: ClassVar[str] = (
        "with layers over blocks below and layers within blocks above, a model with three times the layers predicts as "
        "well as a plain stack, and generates faster from a smaller cache"
    )
    setting: ClassVar[str] = (
        "byte models of width 128 learn prose and code for 600 steps of 32 passages of 256 bytes, with 3 seeds: 3 "
        "plain layers; 2 layers block-to-local, with as many weights; 6 layers block-to-local; blocks of 4. Then "
        "a batch of 128 texts that hold 8,192 tokens each goes on for 16 more, 4 times with each model in turn"
    )
    reads = False
    steps: int = 600
    length: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 128
    context: int = 8192
    texts: int = 128
    generated: int = 16

    def run(self, bench: Bench) -> Finding:
        device = bench.model.device
        models = {  # what joins tokens and spreads contexts has 6 width^2 weights, as has 1 time more in both channels
            "plain, 2 layers": Sizes(width=self.width, channel="gated:times=3.67"),
            "block-to-local, 2 layers": Sizes(width=self.width, stack="block-to-local"),
            "block-to-local, 6 layers": Sizes(width=self.width, layers=6, stack="block-to-local"),
        }
        plain, equal, large = models
        found = by_seed(
            f"lm:length={self.length}",
            models,
            Settings(steps=self.steps, batch=32),
            device=device,
            seeds=self.seeds,
            progress=lambda part: bench.progress(0.95 * part),
        )
        first = {name: runs[0].model for name, runs in found.items()}
        held = {name: held_bytes(model, self.context) for name, model in first.items()}
        speeds: dict[str, list[float]] = {name: [] for name in models}
        states = {name: _read(model, self.texts, self.context) for name, model in first.items()}
        for _ in range(5):
            for name, model in first.items():
                speeds[name].append(_speed(model, self.texts, states[name], self.generated))
        speeds = {name: values[1:] for name, values in speeds.items()}  # the first warms up
        faster = {
            name: mean([a / b for a, b in zip(speeds[name], speeds[plain], strict=True)]) for name in (equal, large)
        }
        gaps = {name: differences(found[name], found[plain], "loss") for name in (equal, large)}
        seen = max(_sees_ahead(model) for model in first.values())
        return Finding(
            {
                **{
                    f"nats a byte, {name}": over_seeds([each.scores["loss"] for each in runs])
                    for name, runs in found.items()
                },
                **{f"nats a byte, {name}, less plain's": gap for name, gap in gaps.items()},
                **{f"state bytes after {self.context} tokens, {name}": Metric.exact(n) for name, n in held.items()},
                **{f"tokens a second, {name}": mean(values) for name, values in speeds.items()},
                **{f"speed over plain's, {name}": ratio for name, ratio in faster.items()},
            },
            {
                "no token sees what comes after it": seen == 0,
                "with as many layers the state is less than a quarter of plain's": held[equal] < held[plain] / 4,
                "with as many layers it generates faster": faster[equal].low > 1,
                "with three times the layers it predicts no worse, by 0.05 nats at most": gaps[large].high < 0.05,
                "with three times the layers the state is still smaller": held[large] < held[plain],
                "with three times the layers it still generates faster": faster[large].low > 1,
            },
        )


@torch.no_grad()
def _read(model: Backbone, texts: int, tokens: int) -> Any:
    """The state of a batch after that many tokens, the same in each text."""
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = model.hidden(ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(texts)  # type: ignore[union-attr]
    return cache.text.state  # type: ignore[union-attr]


@torch.no_grad()
def _speed(model: Backbone, texts: int, state: Any, steps: int) -> float:
    """Tokens a second of all texts that go on from a state."""
    x = model.embed(torch.ones(texts, 1, dtype=torch.long, device=model.device))  # type: ignore[misc]
    float(x.sum())  # waits for the device
    begin = time.perf_counter()
    for _ in range(steps):
        y, state = model.order(x, model.layers, state)
    float(y.sum())
    return steps * texts / (time.perf_counter() - begin)


def _sees_ahead(model: Backbone, n: int = 14) -> float:
    """The largest gradient of a token's output to a token after it."""
    x = torch.randn(1, n, model.config.hidden_size, device=model.device, requires_grad=True)
    y, _ = model.order(x, model.layers)
    most = 0.0
    for t in range(n - 1):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        most = max(most, float(gradient[0, t + 1 :].abs().max()))
    return most
