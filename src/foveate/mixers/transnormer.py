"""TransNormer: linear attention that is normalised, not divided by its weights' sum; softmax in blocks before that."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear, rotated, simple_rms_norm, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes
from foveate.train.trial import by_seed, differences, over_seeds


@mixer("transnormer")
class TransNormer(Mixer):
    """Blocks of softmax attention in early layers, normalised linear attention in later ones.

    NormAttention: O = RMSNorm(phi(Q) (phi(K)' V)), phi(x) = 1 + elu(x), over all heads, with learned weights. The usual
    denominator phi(q) sum phi(k) makes gradients grow without bound as it goes to 0; a norm bounds them by its eps.
    DiagAttention: softmax attention within blocks of tokens that don't overlap, each token seeing those of its own
    block up to itself, so that early layers look at neighbours.

    Which layers are early is by `Shape.layer`. Ours: rotary positions in the blocks, as the backbone adds none of its
    own to the embeddings; the causal form of the blocks, and a state that holds one block at most.

    Fields:
        early: the part of the layers, from the first, that has DiagAttention, rounded down to whole layers.
        block: tokens of a block.
    """

    paper = Paper("The Devil in Linear Transformer", 2022, "https://arxiv.org/abs/2210.10340")
    claim = "trains more stably and better than linear attention with a denominator"

    early: float = 0.5
    block: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.early <= 1:
            raise FoveateError(f"{self}: early is a part of the layers: give 0 to 1.")
        if self.block < 1:
            raise FoveateError(f"{self}: a block must have at least 1 token.")

    def build(self, shape: Shape) -> TokenMixer:
        if shape.layer < int(self.early * shape.layers + 1e-9):  # 0.29 * 100 is a little below 29
            return DiagMixer(shape, self.block)
        return NormMixer(shape)


class NormMixer(TokenMixer):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.head, self.eps = shape.heads, shape.head, shape.eps
        self.qkv = linear(shape.width, 3 * shape.width)
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {"memory": like.new_zeros(batch, self.heads, self.head, self.head, dtype=dtype)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        q, k = (functional.elu(each) + 1 for each in (q, k))
        y, memory = recurrence(q, k, v, None, None if state is None else state["memory"])
        y = simple_rms_norm(y.flatten(2), self.eps) * self.norm.to(y.dtype)
        return self.out(y), None if state is None else {"memory": memory}


class DiagMixer(TokenMixer):
    def __init__(self, shape: Shape, block: int):
        super().__init__()
        if shape.head % 2:
            raise FoveateError(
                f"transnormer: rotary positions need heads of an even size, not {shape.head}: give another number of "
                "heads, or early=0."
            )
        self.heads, self.head, self.block = shape.heads, shape.head, block
        self.qkv = linear(shape.width, 3 * shape.width)
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        empty = like.new_zeros(batch, self.block - 1, self.heads, self.head)
        return {"keys": empty, "values": empty.clone(), "seen": like.new_zeros(batch, dtype=torch.long)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        at = 0 if state is None else state["seen"]
        q, k = rotated(q, at), rotated(k, at)
        if state is None:
            return self.out(_whole_blocks(q, k, v, self.block).flatten(2)), None
        k, v = torch.cat([state["keys"], k], 1), torch.cat([state["values"], v], 1)
        y = _going_on(q, k, v, state["seen"], self.block)
        last = k.shape[1] - self.block + 1
        after = {"keys": k[:, last:].clone(), "values": v[:, last:].clone(), "seen": state["seen"] + x.shape[1]}
        return self.out(y.flatten(2)), after


def _whole_blocks(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Causal attention within each block of a text from its begin; (batch, n, heads, d) each, and so is the result."""
    batch, n = q.shape[:2]
    size = min(block, n)
    q, k, v = (
        functional.pad(each, (0, 0, 0, 0, 0, -n % size)).unflatten(1, (-1, size)).flatten(0, 1).transpose(1, 2)
        for each in (q, k, v)
    )
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :n]


def _going_on(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, block: int) -> Tensor:
    """The same where `seen` (batch,) tokens went by: q (batch, n, ...), k and v with block - 1 tokens before these.

    Queries go in pieces of a block at most, each against the keys that any of them could see, so that time is linear.
    """
    batch, n = q.shape[:2]
    size, extra = min(block, n), block - 1
    pad = -n % size
    q, k, v = (functional.pad(each, (0, 0, 0, 0, 0, pad)) for each in (q, k, v))
    to = (seen[:, None] + torch.arange(n + pad, device=q.device)).unflatten(1, (-1, size))
    before = seen[:, None] - extra + torch.arange(extra + n + pad, device=q.device)
    before = before.unfold(1, extra + size, size)
    # Places before the text have negative numbers, whose block is no query's.
    mine = (to // block).unsqueeze(-1) == (before // block).unsqueeze(-2)
    mask = mine & (before.unsqueeze(-2) <= to.unsqueeze(-1))
    q = q.unflatten(1, (-1, size)).flatten(0, 1).transpose(1, 2)
    k, v = (each.unfold(1, extra + size, size).flatten(0, 1).transpose(2, 3) for each in (k, v))
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(0, 1).unsqueeze(1))
    return y.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :n]


@claim("transnormer")
class TransNormerClaim(Claim):
    statement: ClassVar[str] = (
        "the denominator of linear attention makes gradients unbounded, a norm in its place bounds them and learns "
        "language better, and softmax attention in blocks in early layers makes it better still"
    )
    setting: ClassVar[str] = (
        "gradients of one output with regard to 64 weights as these get smaller, by 10 to the 1st to the 8th; and 2 "
        "layers of width 64 that learn the bytes of prose and code, 128 at a time, for 800 steps of 64 texts, with 3 "
        "seeds: linear attention with a denominator, with a norm in all layers, and transnormer (blocks of 32); all "
        "with a convolution over 3 tokens, as only the blocks have positions"
    )
    reads = False
    steps: int = 800
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 64

    def run(self, bench: Bench) -> Finding:
        device = bench.model.device
        names = {
            "denominator": "linear",
            "norm": "transnormer:early=0",
            "norm after blocks": "transnormer:block=32",
        }
        found = by_seed(
            "lm",
            {name: Sizes(width=self.width, mixer=text, conv=3) for name, text in names.items()},
            Settings(steps=self.steps, lr=2e-3),
            device=device,
            seeds=self.seeds,
            progress=bench.progress,
        )
        losses = {name: over_seeds([each.scores["loss"] for each in runs]) for name, runs in found.items()}
        gain = differences(found["norm"], found["denominator"], "loss")
        more = differences(found["norm after blocks"], found["norm"], "loss")
        divided, normed = _gradients(divided=True), _gradients(divided=False)
        return Finding(
            {
                **{f"loss, {name}": each for name, each in losses.items()},
                "loss with a norm less that with a denominator": gain,
                "loss with blocks before less that without": more,
                "gradient at weights of 1e-8 over that at 0.1, denominator": Metric.exact(divided[-1] / divided[0]),
                "gradient at weights of 1e-8 over that at 0.1, norm": Metric.exact(normed[-1] / normed[0]),
                "largest gradient over its bound, norm": Metric.exact(max(normed) / _bound()),
            },
            {
                "a norm lowers the loss": gain.high < 0,
                "blocks in early layers lower it further": more.high < 0,
            },
        )


_WEIGHTS, _CHANNELS, _EPS = 64, 16, 1e-6


def _values() -> Tensor:
    return torch.randn(_WEIGHTS, _CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _bound() -> float:
    """What the norm of d(sum of normalised outputs)/d(weights) can't exceed.

    The Jacobian of x / sqrt(mean(x^2) + eps) has no singular value above 1 / sqrt(eps), whatever x is.
    """
    return float(torch.linalg.matrix_norm(_values(), 2)) * _CHANNELS**0.5 / _EPS**0.5


def _gradients(divided: bool) -> list[float]:
    """The gradient's norm with regard to the weights s of sum(s v), over their sum or normalised, as s get smaller."""
    values, found = _values(), []
    base = torch.rand(_WEIGHTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    for power in range(1, 9):
        weights = (base * 10.0**-power).requires_grad_()
        total = weights @ values
        y = total / weights.sum() if divided else simple_rms_norm(total, _EPS)
        (gradient,) = torch.autograd.grad(y.sum(), weights)
        found.append(float(gradient.norm()))
    return found
