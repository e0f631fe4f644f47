"""Attention as an RNN: softmax attention with a query that is learned once, over all tokens so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer, state_bytes
from foveate.backbone.parts import linear, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes
from foveate.train.tasks import Batch, TrainTask
from foveate.train.trial import by_seed, differences, over_seeds


@mixer("aaren")
class Aaren(Mixer):
    """Softmax attention whose query q is a weight of the layer, one a head, and not made of the token:

        y_t = sum_(j<=t) exp(s_j) v_j / sum_(j<=t) exp(s_j),    s_j = q . k_j / sqrt(d).

    The score of a token is then the same for all that look at it, so that a running maximum m of scores, and the
    numerator u and the denominator w over exp(m), are all that has to be remembered. Two stretches of text combine as

        m = max(m_a, m_b),    u = u_a exp(m_a - m) + u_b exp(m_b - m),    w likewise,

    which is associative: a parallel prefix scan gives all y_t in depth log n.

    Ours: a head's query is one vector, where the paper passes a learned token through a projection; the scan does work
    linear in the length; no positions are put into keys, as the query stands nowhere.
    """

    paper = Paper("Attention as an RNN", 2024, "https://arxiv.org/abs/2405.13956")
    claim = "does about as well as a transformer on series, with a state of fixed size"

    def build(self, shape: Shape) -> TokenMixer:
        return AarenMixer(shape)


class Stretch(NamedTuple):
    """What a stretch of text comes to: maximum (batch, n, heads), numerator (.., d), denominator (batch, n, heads)."""

    top: Tensor
    total: Tensor
    weight: Tensor

    def at(self, where: slice) -> Stretch:
        return Stretch(*(each[:, where] for each in self))


def combined(a: Stretch, b: Stretch) -> Stretch:
    """The stretch a and then b."""
    top = torch.maximum(a.top, b.top)
    left, right = (a.top - top).exp(), (b.top - top).exp()
    return Stretch(
        top,
        a.total * left.unsqueeze(-1) + b.total * right.unsqueeze(-1),
        a.weight * left + b.weight * right,
    )


def prefixes(parts: Stretch) -> Stretch:
    """For each t, the combination of the parts up to t: depth logarithmic, work linear in the length.

    Neighbours are combined, the half as long sequence of pairs is scanned, and what lies between is filled in.
    """
    n = parts.top.shape[1]
    if n == 1:
        return parts
    odd = prefixes(combined(parts.at(slice(0, n - 1, 2)), parts.at(slice(1, n, 2))))
    # Places 2, 4, ... are the pairs before them and themselves.
    between = (n - 1) // 2
    even = combined(odd.at(slice(0, between)), parts.at(slice(2, n, 2)))
    return Stretch(*(_woven(p[:, :1], o, e) for p, o, e in zip(parts, odd, even, strict=True)))


def _woven(first: Tensor, odd: Tensor, even: Tensor) -> Tensor:
    """first, odd_0, even_0, odd_1, even_1, ...; there are as many of both, or one more of odd."""
    both = torch.stack([odd[:, : even.shape[1]], even], 2).flatten(1, 2)
    return torch.cat([first, both, odd[:, even.shape[1] :]], 1)


class AarenMixer(TokenMixer):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.head = shape.heads, shape.head
        self.query = nn.Parameter(torch.randn(shape.heads, shape.head))
        self.kv = linear(shape.width, 2 * shape.width)
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        empty = like.new_zeros(batch, self.heads, dtype=torch.promote_types(like.dtype, torch.float32))
        return {
            "top": empty - torch.inf,
            "total": empty.unsqueeze(-1).repeat(1, 1, self.head),
            "weight": empty,
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        k, v = split_heads(self.kv(x), 2 * self.heads).chunk(2, 2)
        dtype = torch.promote_types(x.dtype, torch.float32)
        scores = (k.to(dtype) * self.query.to(dtype)).sum(-1) / math.sqrt(self.head)
        # The maximum only keeps numbers in range: no gradient goes through it, as the result does not hang on it.
        top = scores.detach()
        weight = (scores - top).exp()
        parts = Stretch(top, v.to(dtype) * weight.unsqueeze(-1), weight)
        if state is not None:
            before = (state[name].to(dtype).unsqueeze(1) for name in ("top", "total", "weight"))
            parts = Stretch(*(torch.cat(each, 1) for each in zip(before, parts, strict=True)))
        top, total, weight = prefixes(parts)
        y = (total / weight.unsqueeze(-1).clamp_min(1e-30))[:, -x.shape[1] :]
        if state is not None:
            state = {"top": top[:, -1].clone(), "total": total[:, -1].clone(), "weight": weight[:, -1].clone()}
        return self.out(y.to(x.dtype).flatten(2)), state


@dataclass(frozen=True, kw_only=True)
class Series(TrainTask):
    """Forecasting: a series is two sines of random period, phase and height and noise that fades slowly, made to have
    mean 0 and variance 1; each token is `patch` of its values, and is to say the next `patch`.

    Fields:
        patches: tokens of a series.
        patch: values of a token.
    """

    name: ClassVar[str] = "series"
    about = "the next values of a series"
    head = "values"
    better = "loss"
    higher = False

    patches: int = 24
    patch: int = 8

    @property
    def vocabulary(self) -> int:
        return 0

    @property
    def sizes(self) -> tuple[int, int]:
        return self.patch, self.patch

    @property
    def tokens(self) -> int:
        return self.patches

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        device, n = generator.device, (self.patches + 1) * self.patch
        drawn = torch.rand(3, count, 2, 1, device=device, generator=generator)
        period, phase, height = 6 * 12 ** drawn[0], 2 * math.pi * drawn[1], 0.3 + drawn[2]
        time = torch.arange(n, device=device)
        waves = (height * (2 * math.pi * time / period + phase).sin()).sum(1)
        steps = 0.1 * torch.randn(count, n, device=device, generator=generator)
        fade = 0.9 ** (time[:, None] - time).clamp_min(0) * (time[:, None] >= time)
        series = waves + steps @ fade.mT
        series = (series - series.mean(1, keepdim=True)) / series.std(1, keepdim=True)
        values = series.unflatten(1, (-1, self.patch))
        return Batch(values[:, :-1], values[:, 1:])


@claim("aaren")
class AarenClaim(Claim):
    statement: ClassVar[str] = (
        "attention with a learned query, computed as an RNN, forecasts series about as well as a transformer, and its "
        "parallel form and its step by step form are the same attention, with constant memory"
    )
    setting: ClassVar[str] = (
        "2 layers of width 64 learn series made of two sines and slowly fading noise, 24 tokens of 8 values, for 800 "
        "steps of 64 series, with 3 seeds: aaren, causal softmax attention, and attention to the own token alone; "
        "and the forms on 500 random tokens. The paper's own data sets are not used"
    )
    reads = False
    steps: int = 800
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 64

    def run(self, bench: Bench) -> Finding:
        device = bench.model.device
        wrong, held = _forms(device)
        names = {"aaren": "aaren", "softmax": "softmax", "own token alone": "softmax:window=1"}
        models = {name: Sizes(width=self.width, mixer=text) for name, text in names.items()}
        settings = Settings(steps=self.steps, lr=2e-3)
        found = by_seed(Series(), models, settings, device=device, seeds=self.seeds, progress=bench.progress)
        losses = {name: [each.scores["loss"] for each in runs] for name, runs in found.items()}
        ratio = over_seeds([a / b for a, b in zip(losses["aaren"], losses["softmax"], strict=True)])
        gain = differences(found["aaren"], found["own token alone"], "loss")
        return Finding(
            {
                **{f"squared error, {name}": over_seeds(values) for name, values in losses.items()},
                "error of aaren over softmax's": ratio,
                "error of aaren less that of the own token alone": gain,
                "largest difference of scan, steps and plain softmax": Metric.exact(wrong),
                "state bytes after 500 tokens": Metric.exact(held[1]),
            },
            {
                "scan, steps and plain softmax agree to 1e-5": wrong < 1e-5,
                "the state is as large after 500 tokens as after 5": held[0] == held[1],
                "the error is at most a tenth above softmax's": ratio.high < 1.1,
                "it uses the series before a token": gain.high < 0,
            },
        )


@torch.no_grad()
def _forms(device: torch.device) -> tuple[float, tuple[int, int]]:
    """How far scan, steps and plain prefix attention are apart, and the state's bytes after 5 and 500 tokens."""
    torch.manual_seed(0)
    module = AarenMixer(Shape(64, 4)).to(device)
    x = torch.randn(2, 500, 64, device=device)
    scan, _ = module(x)
    state, rows, held = module.start(2, x), [], []
    for piece in x.split(1, 1):
        y, state = module(piece, state)
        rows.append(y)
        held.append(state_bytes(state))
    k, v = split_heads(module.kv(x), 8).chunk(2, 2)
    scores = torch.einsum("bnhd,hd->bhn", k, module.query) / math.sqrt(module.head)
    ahead = torch.ones(500, 500, dtype=torch.bool, device=device).triu(1)
    weights = scores.unsqueeze(2).masked_fill(ahead, -torch.inf).softmax(-1)
    plain = module.out((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2))
    wrong = max(float((plain - other).abs().max()) for other in (scan, torch.cat(rows, 1)))
    return wrong, (held[4], held[499])
