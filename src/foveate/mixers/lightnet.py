"""LightNet: an additive recurrence, whose state is a softmax over the text and favours no end of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.claims import Claim, Finding, claim
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.mixers.gated_linear import GatedLinear
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes, build, fit
from foveate.train.show import Show
from foveate.train.tasks import Batch, TrainTask
from foveate.train.trial import Learned, differences, over_seeds

RANGE = 30.0
"""Keys are kept within it, so that their exponentials and sums of these stay in the range of float32."""


@mixer("lightnet")
class LightNet(Mixer):
    """Linear attention with a decay that adds up, where others multiply: for each channel of the keys

        g_t = g_(t-1) + exp(k_t),    S_t = (g_(t-1) / g_t) S_(t-1) + (exp(k_t) / g_t) v_t',    o_t = S_t' silu(q_t),

    so that S_t is the mean of all v_j so far with weights softmax_j(k_j): a token's weight does not fall with its
    distance, and where a token may see both sides, all read the one S_n of a single scan (`everywhere`). The output is
    W_o (norm(o_t) * sigmoid(U_2 U_1 x_t)), with a gate of the rank of a head. As g S only adds up, it is computed as
    the recurrence with A = 1, k = exp(k), and queries over g_t.

    Positions are two parts. TPE, in the first layer, adds a Toeplitz filter to the input, x_t + p sum_(j<=t) l^(t-j)
    x_j, with a decay l a head. LRPE turns channel c of queries and keys by its place, (cos a_c t, sin a_c t), so that
    products hang on distances; the state is twice as large.

    Of the multi-dimensional part `everywhere` has MD-LRPE, channels shared out to the axes; MD-TPE, a filter along each
    axis, is left out. The paper's pages could not be read; this follows its abstract and its authors' code. Ours: p is
    a channel's, keys are squashed to [-30, 30], and there are no norms and maps after the filter.

    Fields:
        tpe: whether there is the Toeplitz filter before the first layer.
        lrpe: whether queries and keys are turned by their places.
    """

    paper = Paper(
        "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        2024,
        "https://arxiv.org/abs/2405.21022",
    )
    claim = "sees all of an image in one scan, where a multiplied decay needs several"

    tpe: bool = True
    lrpe: bool = True

    def build(self, shape: Shape) -> TokenMixer:
        return LightNetMixer(shape, tpe=self.tpe and shape.layer == 0, lrpe=self.lrpe)


class LightNetMixer(TokenMixer):
    """Args: the shape; whether a Toeplitz filter comes first; whether queries and keys are turned by their places."""

    def __init__(self, shape: Shape, tpe: bool, lrpe: bool):
        super().__init__()
        self.heads, self.head, self.lrpe = shape.heads, shape.head, lrpe
        self.qkv = linear(shape.width, 3 * shape.width)
        self.gate = nn.Sequential(linear(shape.width, shape.head), linear(shape.head, shape.width))
        self.norm = nn.RMSNorm(shape.width, eps=shape.eps)
        self.out = linear(shape.width, shape.width)
        self.fade = nn.Parameter(torch.linspace(0.0, 4.0, shape.heads)) if tpe else None  # l is from 0.5 to 0.98
        self.strength = nn.Parameter(torch.full((shape.width,), 0.1)) if tpe else None

    def start(self, batch: int, like: Tensor) -> State:
        dtype = torch.promote_types(like.dtype, torch.float32)
        total = like.new_zeros(batch, self.heads, self.head, dtype=dtype)
        state = {
            "memory": like.new_zeros(batch, self.heads, self.head * (1 + self.lrpe), self.head, dtype=dtype),
            "total": total,
            "seen": like.new_zeros(batch, dtype=torch.long),
        }
        return state if self.fade is None else {**state, "tpe": total.unsqueeze(2).clone()}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        after: State = {}
        if self.fade is not None:
            assert self.strength is not None
            one = x.new_ones(*x.shape[:2], self.heads, 1)
            before = None if state is None else state["tpe"]
            filtered, after["tpe"] = recurrence(
                one, one, split_heads(x, self.heads), functional.logsigmoid(self.fade), before
            )
            x = x + self.strength.to(x.dtype) * filtered.flatten(2)
        q, k, v = self.queries(x)
        total = k.cumsum(1) + (0.0 if state is None else state["total"].unsqueeze(1))
        q = q / total
        if self.lrpe:
            places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            places = places if state is None else places + state["seen"].unsqueeze(1)
            q, k = turned(q, places.unsqueeze(-1)), turned(k, places.unsqueeze(-1))
        o, memory = recurrence(q, k, v, None, None if state is None else state["memory"])
        y = self.written(x, o)
        if state is None:
            return y, None
        return y, {**after, "memory": memory, "total": total[:, -1].clone(), "seen": state["seen"] + x.shape[1]}

    def everywhere(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """All tokens see all, in one scan without an order; no filter is put before.

        Args:
            x: (batch, n, width).
            places: where tokens stand, (n, axes), the axes dividing a head's channels; None: without positions.
        """
        q, k, v = self.queries(x)
        q = q / k.sum(1, keepdim=True)
        if places is not None:
            q, k = turned(q, places[None]), turned(k, places[None])
        memory = torch.einsum("bnhf,bnhd->bhfd", k, v)
        return self.written(x, torch.einsum("bnhf,bhfd->bnhd", q, memory))

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, exponentials of keys, and values, (batch, n, heads, d), in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).to(dtype).chunk(3, 2)
        return functional.silu(q), (RANGE * (k / RANGE).tanh()).exp(), v

    def written(self, x: Tensor, o: Tensor) -> Tensor:
        return self.out(self.norm(o.flatten(2).to(x.dtype)) * self.gate(x).sigmoid())


def turned(x: Tensor, places: Tensor) -> Tensor:
    """(x cos a, x sin a), whose products are those of x times cos of a difference of angles.

    Args:
        x: (batch, n, heads, d).
        places: (batch, n, axes); channels 0 .. d / axes - 1 turn with the first axis, and so on.

    Returns:
        (batch, n, heads, 2 d).
    """
    each = x.shape[-1] // places.shape[-1]
    rates = 10_000.0 ** (-torch.arange(each, device=x.device, dtype=x.dtype) / each)
    angles = (places.to(x.dtype).unsqueeze(-1) * rates).flatten(-2).unsqueeze(2)
    return torch.cat([x * angles.cos(), x * angles.sin()], -1)


class Scans(TokenMixer):
    """A mixer over an image whose cells are a row of tokens: one scan without order, or one or two with a decay."""

    def __init__(self, mixer: TokenMixer, scans: int):
        super().__init__()
        self.mixer, self.scans = mixer, scans

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        if isinstance(self.mixer, LightNetMixer):
            return self.mixer.everywhere(x), None
        y, _ = self.mixer(x)
        return (y if self.scans == 1 else y + self.mixer(x.flip(1))[0].flip(1)), None


@dataclass(frozen=True, kw_only=True)
class Marks(TrainTask):
    """A square image with two cells that have one of four colours, the others being empty; the sum of the two colours
    modulo 4 is the class.

    Fields:
        side: cells of a row.
    """

    name: ClassVar[str] = "marks"
    about = "the sum of two marked cells of an image"
    head = "classes"

    side: int = 12

    @property
    def vocabulary(self) -> int:
        return 5

    @property
    def sizes(self) -> tuple[int, int]:
        return 0, 4

    @property
    def tokens(self) -> int:
        return self.side**2

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        device = generator.device
        colours = torch.randint(4, (count, 2), device=device, generator=generator)
        at = torch.rand(count, self.tokens, device=device, generator=generator).argsort(1)[:, :2]
        inputs = torch.zeros(count, self.tokens, dtype=torch.long, device=device)
        return Batch(inputs.scatter(1, at, 1 + colours), colours.sum(1) % 4)


@claim("lightnet")
class LightNetClaim(Claim):
    statement: ClassVar[str] = (
        "with an additive recurrence one scan sees an image as well as several scans with a multiplied decay do, and "
        "better than one, in less time"
    )
    setting: ClassVar[str] = (
        "12 x 12 images, made on the spot, the class being the sum of the colours of two cells; 2 layers of width 64, "
        "no positions: lightnet in one scan, gated linear attention in one row by row and in two, forwards "
        "and backwards with the same weights; 3 seeds, 400 steps of 64 images. The paper's ImageNet is not run"
    )
    reads = False
    steps: int = 400
    seeds: tuple[int, ...] = (0, 1, 2)
    side: int = 12

    def run(self, bench: Bench) -> Finding:
        device, task = bench.model.device, Marks(side=self.side)
        scans = {"additive, one scan": 0, "decay, one scan": 1, "decay, two scans": 2}
        found: dict[str, list[Learned]] = {name: [] for name in scans}
        for seed in self.seeds:
            for name, count in scans.items():
                done = sum(map(len, found.values()))
                show = Show(lambda part, done=done: bench.progress((done + part) / len(scans) / len(self.seeds)))  # type: ignore[misc]
                model = build(
                    task, Sizes(mixer="gated-linear" if count else "lightnet:tpe=false,lrpe=false"), seed=seed
                )
                for layer in model.layers:
                    layer.mixer = Scans(layer.mixer, count)  # type: ignore[arg-type, assignment]
                report = fit(model.to(device), task, Settings(steps=self.steps, lr=3e-3, seed=seed), show=show)  # type: ignore[arg-type]
                scores = {metric: each.value for metric, each in task.judge(model).items()}
                found[name].append(Learned(model, report, scores))
        over = {name: differences(found["additive, one scan"], found[name], "accuracy") for name in list(scans)[1:]}
        speed = {name: [each.report.tokens_per_second for each in runs] for name, runs in found.items()}
        faster = over_seeds(
            [a / b for a, b in zip(*(speed[name] for name in (list(scans)[0], list(scans)[2])), strict=True)]
        )
        order = _by_order(device)
        return Finding(
            {
                **{f"accuracy, {n}": over_seeds([r.scores["accuracy"] for r in runs]) for n, runs in found.items()},
                **{f"accuracy of the additive scan less that of {name}": each for name, each in over.items()},
                "speed of the additive scan over two scans": faster,
                **{
                    f"change of the final state when tokens are shuffled, {n}": Metric.exact(v)
                    for n, v in order.items()
                },
            },
            {
                "as good as two scans with a decay, by 2 points at most": over["decay, two scans"].low > -0.02,
                "better than one scan with a decay": over["decay, one scan"].low > 0,
                "faster than two scans": faster.low > 1,
                "the additive state is the same in any order, the other is not": order["additive"] < 1e-4
                and order["decay"] > 1e-2,
            },
        )


@torch.no_grad()
def _by_order(device: torch.device) -> dict[str, float]:
    """How much S after 200 tokens changes, over its norm, when they are shuffled: additive, and with a decay."""
    torch.manual_seed(0)
    x, order = torch.randn(1, 200, 64, device=device), torch.randperm(200, device=device)
    shape, changes = Shape(64, 4), {}
    for name, part in (("additive", LightNet(tpe=False, lrpe=False)), ("decay", GatedLinear())):
        module = part.build(shape).to(device)
        a, b = (module(each, module.start(1, x))[1]["memory"] for each in (x, x[:, order]))  # type: ignore[index]
        changes[name] = float((a - b).norm() / a.norm())
    return changes
