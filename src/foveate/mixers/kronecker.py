"""Third-order tensor attention: softmax over pairs of tokens."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import cached, linear, split_heads, visible
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes
from foveate.train.tasks import Batch, TrainTask
from foveate.train.trial import by_seed, differences, over_seeds

AT_ONCE = 2**24
"""Scores that are worked on at once, where there is a choice."""
FEATURE_CHUNK = 64
"""Tokens whose sums over features are made at once."""


@mixer("kronecker")
class Kronecker(Mixer):
    """Attention over pairs (j, k) of tokens, both up to i:

        s_ijk = sum_c Q_ic K1_jc K2_kc / sqrt(d),    y_i = sum_jk softmax_jk(s_ijk) (V1_j * V2_k),    * entry by entry.

    Exact, that is cubic in the length. With a `degree` g the exponential is its Taylor polynomial of degree g, and
    since s^p is a sum of products of monomials of Q_i, K1_j and K2_k, the sums over j and over k part:

        y_i = (sum_f c_f f(Q_i) A_f * B_f) / (sum_f c_f f(Q_i) a_f b_f),
        A_f = sum_(j<=i) f(K1_j) V1_j,  a_f = sum_(j<=i) f(K1_j),  B_f and b_f likewise of K2 and V2,

    f over the monomials of degree up to g, c_f = 1 / (the factorials of f's exponents * sqrt(d) ** (f's degree)).
    Time is linear in the length, the state has a fixed size, and both grow with the C(d + g, g) monomials. It is near
    the exact form where entries of Q, K1 and K2 are small; nothing forces them to be.

    Ours: the causal mask and the scale 1 / sqrt(d) of attention; the plain Taylor polynomial, which is above 0 for even
    degrees, where the paper takes one of least degree for a bound. There are no positions.

    Fields:
        degree: of the polynomial, even; 0: exact. The state grows with the text only if exact.
    """

    paper = Paper(
        "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation",
        2023,
        "https://arxiv.org/abs/2310.04064",
    )
    claim = "detects triples that attention can't, in near-linear time where entries are small"
    grows = True

    degree: int = 0

    def __post_init__(self) -> None:
        if self.degree < 0 or self.degree % 2:
            raise FoveateError(
                f"kronecker: a polynomial of degree {self.degree} is not above 0 everywhere, and no weights can be "
                "made of it: give an even degree, or 0 for the exact form."
            )

    def build(self, shape: Shape) -> TokenMixer:
        if self.degree and (count := math.comb(shape.head + self.degree, self.degree)) > 20_000:
            raise FoveateError(
                f"kronecker: {count:,} monomials of degree {self.degree} for heads of {shape.head} are too many: give "
                "a smaller degree or more heads."
            )
        return KroneckerMixer(shape, self.degree)


def tensor_attention(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    """The exact form; q is of the last n tokens.

    Args:
        q: (batch, n, heads, d).
        k1, k2, v1, v2: (batch, held + n, heads, d).

    Returns:
        (batch, n, heads, d) in the dtype of v1; softmax and sums are in float32 at least.
    """
    out, (n, total) = v1.dtype, (q.shape[1], k1.shape[1])
    dtype = torch.promote_types(out, torch.float32)
    q, k1, k2, v1, v2 = (x.to(dtype).transpose(1, 2) for x in (q, k1, k2, v1, v2))  # batch, heads, n, d
    size = max(1, AT_ONCE // (q.shape[0] * q.shape[1] * total**2))
    rows = []
    for begin in range(0, n, size):
        end = min(n, begin + size)
        held = total - n + begin  # no query of this chunk sees past its own end
        args = q[:, :, begin:end], *(x[:, :, : held + end - begin] for x in (k1, k2, v1, v2))
        # All scores of all chunks would be kept for the way back: they are made again instead.
        again = size < n and torch.is_grad_enabled() and q.requires_grad
        rows.append(checkpoint(_pairs, *args, use_reentrant=False) if again else _pairs(*args))
    return torch.cat(rows, 2).transpose(1, 2).to(out)


def _pairs(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    n, total = q.shape[2], k1.shape[2]
    left = (q / math.sqrt(q.shape[-1])).unsqueeze(3) * k1.unsqueeze(2)  # batch, heads, i, j, d
    scores = left @ k2.mT.unsqueeze(2)  # batch, heads, i, j, k
    seen = visible(n, total - n, device=q.device)
    scores = scores.masked_fill(~(seen.unsqueeze(2) & seen.unsqueeze(1)), -torch.inf)
    weights = scores.flatten(3).softmax(-1).unflatten(3, (total, total))
    return ((weights @ v2.unsqueeze(2)) * v1.unsqueeze(2)).sum(3)


def exponents(head: int, degree: int) -> tuple[Tensor, Tensor]:
    """All monomials of degree up to `degree` in `head` variables.

    Returns:
        which variables each multiplies, (count, degree), where `head` stands for the number 1; and the product of the
        factorials of its exponents, (count,). Both int64.
    """
    found = list(itertools.combinations_with_replacement(range(head + 1), degree))
    products = [math.prod(math.factorial(n) for c, n in Counter(each).items() if c < head) for each in found]
    return torch.tensor(found), torch.tensor(products)


def monomials(x: Tensor, which: Tensor) -> Tensor:
    """(.., d) to (.., count)."""
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    total = x[..., which[:, 0]]
    for column in which.unbind(1)[1:]:
        total = total * x[..., column]
    return total


def tensor_attention_by_degree(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    table: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The form with a polynomial; all are of the same n tokens.

    Args:
        q, k1, k2, v1, v2: (batch, n, heads, d).
        table: the `exponents` of d and a degree.
        held: the sums before the first token, each (batch, heads, count, d + 1), float32 at least; None: zeros.

    Returns:
        (batch, n, heads, d) in the dtype of v1, and the sums after the last token. Sums are in float32 at least.
    """
    out, dtype = v1.dtype, torch.promote_types(v1.dtype, torch.float32)
    which, products = table
    factors = 1 / (products.to(dtype) * q.shape[-1] ** ((which < q.shape[-1]).sum(1).to(dtype) / 2))
    if held is None:
        empty = q.new_zeros(q.shape[0], q.shape[2], len(which), q.shape[3] + 1, dtype=dtype)
        held = empty, empty
    rows = []
    for chunk in zip(*(x.to(dtype).split(FEATURE_CHUNK, 1) for x in (q, k1, k2, v1, v2)), strict=True):
        query, *keys = (monomials(x, which) for x in chunk[:3])
        values = (torch.cat([v, torch.ones_like(v[..., :1])], -1) for v in chunk[3:])
        sums = [
            (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1) + before.unsqueeze(1)
            for k, v, before in zip(keys, values, held, strict=True)
        ]  # batch, n, heads, count, d + 1
        total = torch.einsum("bnhf,bnhfe->bnhe", query * factors, sums[0] * sums[1])
        rows.append(total[..., :-1] / total[..., -1:])
        held = sums[0][:, -1].clone(), sums[1][:, -1].clone()
    return torch.cat(rows, 1).to(out), held


class KroneckerMixer(TokenMixer):
    """Args: the shape; the polynomial's degree, 0 for the exact form."""

    def __init__(self, shape: Shape, degree: int):
        super().__init__()
        self.heads, self.head, self.degree = shape.heads, shape.head, degree
        self.qkkvv = linear(shape.width, 5 * shape.width)
        self.out = linear(shape.width, shape.width)
        self.which: Tensor
        self.products: Tensor
        if degree:
            for name, table in zip(("which", "products"), exponents(shape.head, degree), strict=True):
                self.register_buffer(name, table)

    def start(self, batch: int, like: Tensor) -> State:
        if self.degree:
            dtype = torch.promote_types(like.dtype, torch.float32)
            shape = (batch, self.heads, len(self.which), self.head + 1)
            return {name: like.new_zeros(shape, dtype=dtype) for name in ("first", "second")}
        empty = like.new_zeros(batch, 0, self.heads, self.head)
        return {**dict.fromkeys(("k1", "k2", "v1", "v2"), empty), "seen": like.new_zeros(batch, dtype=torch.long)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k1, k2, v1, v2 = split_heads(self.qkkvv(x), 5 * self.heads).chunk(5, 2)
        if self.degree:
            held = None if state is None else (state["first"], state["second"])
            table = self.which, self.products
            y, (first, second) = tensor_attention_by_degree(q, k1, k2, v1, v2, table, held)
            return self.out(y.flatten(2)), None if state is None else {"first": first, "second": second}
        if state is not None:
            joined, state = cached(state, k1=k1, k2=k2, v1=v1, v2=v2)
            k1, k2, v1, v2 = (joined[name] for name in ("k1", "k2", "v1", "v2"))
        return self.out(tensor_attention(q, k1, k2, v1, v2).flatten(2)), state


@dataclass(frozen=True, kw_only=True)
class Match3(TrainTask):
    """Triple detection, after "Representational Strengths and Limitations of Transformers" (arXiv 2306.02896), made
    causal: `numbers` of them first, then questions; a question x is to say whether two of the numbers, or one number
    twice, make 0 with it modulo `modulus`.

    Fields:
        numbers: that pairs are made of.
        questions: numbers that are asked about.
        modulus: how many different numbers there are. Half of all questions have a pair, about, at the defaults.
    """

    name: ClassVar[str] = "match3"
    about = "whether three numbers make 0"

    numbers: int = 6
    questions: int = 10
    modulus: int = 31

    @property
    def vocabulary(self) -> int:
        return 2 * self.modulus

    @property
    def tokens(self) -> int:
        return self.numbers + self.questions

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        shape = (count, self.tokens)
        inputs = torch.randint(0, self.modulus, shape, device=generator.device, generator=generator)
        given, asked = inputs.split([self.numbers, self.questions], 1)
        pairs = (given.unsqueeze(2) + given.unsqueeze(1)).flatten(1)
        found = ((pairs.unsqueeze(1) + asked.unsqueeze(2)) % self.modulus == 0).any(2)
        targets = torch.full_like(inputs, -100)
        targets[:, self.numbers :] = found.long()
        return Batch(torch.cat([given, asked + self.modulus], 1), targets)


@claim("kronecker")
class KroneckerClaim(Claim):
    statement: ClassVar[str] = (
        "softmax over pairs of tokens detects triples that attention of one layer can't, takes cubic time exactly, and "
        "where entries are small a polynomial of low degree is near it in near-linear time"
    )
    setting: ClassVar[str] = (
        "1 layer of width 64 learns whether a number and two of 6 others make 0 modulo 31, for 2,500 steps of 128 "
        "texts of 10 questions, with 2 seeds, against softmax attention of as many weights; and with random numbers in "
        "(-B, B), heads of 8: the polynomial's error for B of 0.5 to 3 and degrees 2 and 4, and both forms' times"
    )
    reads = False
    steps: int = 2500
    seeds: tuple[int, ...] = (0, 1)
    width: int = 64
    lengths: tuple[int, int] = (256, 1024)

    def run(self, bench: Bench) -> Finding:
        device = bench.model.device
        errors = {(b, g): _error(b, g, device) for b in (0.5, 1.0, 2.0, 3.0) for g in (2, 4)}
        growth = {name: _growth(degree, self.lengths, device) for name, degree in (("exact", 0), ("degree 2", 2))}
        models = {  # two projections more, made up for by a wider channel mixer
            "kronecker": Sizes(width=self.width, layers=1, mixer="kronecker"),
            "softmax": Sizes(width=self.width, layers=1, mixer="softmax:positions=none", channel="gated:times=3.34"),
        }
        settings = Settings(steps=self.steps, batch=128, lr=2e-3)
        found = by_seed(Match3(), models, settings, device=device, seeds=self.seeds, progress=bench.progress)
        gain = differences(found["kronecker"], found["softmax"], "accuracy")
        small = [errors[b, g] for b in (0.5, 1.0) for g in (2, 4)]
        return Finding(
            {
                **{
                    f"accuracy at triples, {name}": over_seeds([each.scores["accuracy"] for each in runs])
                    for name, runs in found.items()
                },
                "accuracy of kronecker less softmax's": gain,
                **{f"error of degree {g}, entries below {b:g}": Metric.exact(e) for (b, g), e in errors.items()},
                **{f"time grows with the length to the power, {name}": Metric.exact(p) for name, p in growth.items()},
            },
            {
                "it detects more triples than attention": gain.low > 0,
                "a polynomial is within 1% of the exact form for entries below 1": max(small) < 0.01,
                "its error grows with the bound": all(
                    errors[a, g] < errors[b, g] for g in (2, 4) for a, b in ((0.5, 1.0), (1.0, 2.0), (2.0, 3.0))
                ),
                "a higher degree is nearer": all(errors[b, 4] < errors[b, 2] for b in (0.5, 1.0, 2.0, 3.0)),
                "the polynomial's time grows by a lower power of the length": growth["degree 2"] + 0.5
                < growth["exact"],
            },
        )


def _random(length: int, bound: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    drawn = torch.rand(5, 4, length, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    q, k1, k2, v1, v2 = ((2 * drawn - 1) * bound).to(device).unbind(0)
    return q, k1, k2, v1, v2


def _table(degree: int, device: torch.device) -> tuple[Tensor, Tensor]:
    which, products = exponents(8, degree)
    return which.to(device), products.to(device)


@torch.no_grad()
def _error(bound: float, degree: int, device: torch.device) -> float:
    """The norm of what is wrong over the norm of the exact result, for 48 tokens."""
    given = _random(48, bound, device)
    exact = tensor_attention(*given)
    near, _ = tensor_attention_by_degree(*given, table=_table(degree, device))
    return float((near - exact).norm() / exact.norm())


@torch.no_grad()
def _growth(degree: int, lengths: tuple[int, int], device: torch.device) -> float:
    """The power of the length that the time grows by, from the shorter to the longer text."""
    seconds, table = [], _table(degree, device) if degree else None
    for length in lengths:
        q, k1, k2, v1, v2 = (x[:1].float() for x in _random(length, 1.0, device))
        best = math.inf
        for _ in range(3):
            begin = time.perf_counter()
            if table:
                y, _ = tensor_attention_by_degree(q, k1, k2, v1, v2, table)
            else:
                y = tensor_attention(q, k1, k2, v1, v2)
            float(y.sum())  # waits for the device
            best = min(best, time.perf_counter() - begin)
        seconds.append(best)
    return math.log(seconds[1] / seconds[0]) / math.log(lengths[1] / lengths[0])
