"""MoH: each token chooses the heads that it uses, as a mixture of experts chooses its experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, cached, linear, rotated, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.mixers.softmax import Softmax
from foveate.tasks.base import Bench
from foveate.train.build import Sizes, build
from foveate.train.loop import Settings, fit
from foveate.train.show import Show
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import Learned, by_seed, differences, over_seeds


@mixer("mixture-of-heads")
class MixtureOfHeads(Mixer):
    """Multi-head attention is a sum over heads, sum_i H_i W_i; here it is a weighted one, sum_i g_i H_i W_i.

    Of h heads the first s are shared: every token uses them. Of the others a token uses the k that its router likes
    most. With p = softmax(W_r x) over the routed heads, q = softmax(W_s x) over the shared ones and
    (a, b) = 2 softmax(W_h x),

        g_i = a s q_i for a shared head,  g_i = b k p_i / (sum of p over the chosen) for a chosen one,  0 for the rest.

    The factors 2, s and k, and the division by the sum, are those of the released code: routers that are indifferent
    give g = 1 for the heads in use, so that with all heads in use it is multi-head attention. Training adds
    `balance` x routed heads x sum_i f_i P_i to the loss, f_i being the fraction of tokens that chose head i and P_i its
    mean p. Every head is computed here, and those that a token did not choose are weighted with 0: the mechanism and
    its quality, not the time that skipping them would save. Keys and values of all heads are held, as other tokens may
    choose them.

    Fields:
        active: the fraction of heads that a token uses, the shared ones among them.
        shared: heads that every token uses.
        balance: the weight of the loss that keeps the routed heads equally in use.
    """

    paper = Paper("MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024, "https://arxiv.org/abs/2410.11842")
    claim = "is better than attention with all heads where each token uses half of them to nine in ten"
    grows = True

    active: float = 0.75
    shared: int = 1
    balance: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.active <= 1:
            raise FoveateError(f"{self}: active is a fraction of the heads: give a number above 0, 1 at most.")
        if self.shared < 0 or self.balance < 0:
            raise FoveateError(f"{self}: shared and balance must be 0 or more.")

    def build(self, shape: Shape) -> TokenMixer:
        routed = round(self.active * shape.heads) - self.shared
        if routed < 1:
            raise FoveateError(
                f"{self}: {self.active:g} of {shape.heads} heads are {routed + self.shared}, which leaves none to "
                f"choose beside {self.shared} shared: give a larger active, or fewer shared."
            )
        if shape.head % 2:
            raise FoveateError(
                f"mixture-of-heads: rotary positions need heads of an even size, not {shape.head}: give another number "
                "of heads."
            )
        return MixtureOfHeadsMixer(shape, self.shared, routed, self.balance)


class MixtureOfHeadsMixer(TokenMixer):
    """Args: the shape; shared heads; routed heads that a token uses; the weight of the balance loss."""

    def __init__(self, shape: Shape, shared: int, chosen: int, balance: float):
        super().__init__()
        self.heads, self.shared, self.chosen, self.balance = shape.heads, shared, chosen, balance
        self.qkv = linear(shape.width, 3 * shape.width)
        self.out = linear(shape.width, shape.width)
        self.route = linear(shape.width, shape.heads - shared)
        self.route_shared = linear(shape.width, shared) if shared > 1 else None  # of one head the softmax is 1
        self.route_kinds = linear(shape.width, 2) if shared else None

    def start(self, batch: int, like: Tensor) -> State:
        empty = like.new_zeros(batch, 0, self.heads, self.qkv.in_features // self.heads)
        return {"keys": empty, "values": empty, "seen": like.new_zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        at = 0 if state is None else state["seen"]
        q, k = rotated(q, at), rotated(k, at)
        if state is not None:
            held, state = cached(state, keys=k, values=v)
            k, v = held["keys"], held["values"]
        y = attend(q, k, v) * self.gates(x).unsqueeze(-1).to(v.dtype)
        return self.out(y.flatten(2)), state

    def gates(self, x: Tensor) -> Tensor:
        """The weight of each head at each token, (batch, n, heads), float32 at least; shared heads come first."""
        p = _shares(self.route, x)
        mask = torch.zeros_like(p).scatter(-1, p.topk(self.chosen, -1).indices, 1.0)
        self.extra_loss = None
        if self.training and self.balance:
            per_head = (mask.mean((0, 1)) * p.mean((0, 1))).sum()
            self.extra_loss = self.balance * p.shape[-1] * per_head
        kept = p * mask
        gates = self.chosen * kept / kept.sum(-1, keepdim=True)
        if self.route_kinds is None:
            return gates
        always = torch.ones_like(p[..., :1]) if self.route_shared is None else _shares(self.route_shared, x)
        kinds = 2 * _shares(self.route_kinds, x)
        return torch.cat([kinds[..., :1] * self.shared * always, kinds[..., 1:] * gates], -1)


def _shares(router: nn.Linear, x: Tensor) -> Tensor:
    """softmax(W x), in float32 at least: rounded scores would choose other heads."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.to(dtype), router.weight.to(dtype)).softmax(-1)


@claim("mixture-of-heads")
class MixtureOfHeadsBeatsAllHeads(Claim):
    statement: ClassVar[str] = (
        "a token that chooses half to nine tenths of the heads is predicted better than with all heads (abstract); so "
        "choosing must be better than having as many heads, the same ones for all tokens"
    )
    setting: ClassVar[str] = (
        "two layers of width 64 with 8 heads, the next byte of prose and code in passages of 128: each token choosing "
        "75% and 50% of the heads (2 shared ones among them; routers are 2% more weights), all heads, and the first "
        "75% and 50% of them with the others off from the first step on; 3 seeds, 500 steps of 64 passages each"
    )
    reads: ClassVar[bool] = False
    steps: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64, heads=8)
    task: str = "lm:length=128"
    fractions: tuple[float, ...] = (0.75, 0.5)

    def run(self, bench: Bench) -> Finding:
        settings, device = Settings(steps=self.steps, lr=3e-3), bench.model.device
        names = {fraction: f"{fraction:.0%} of the heads, chosen" for fraction in self.fractions}
        part = (1 + len(names)) / (1 + 2 * len(names))
        found = by_seed(
            self.task,
            {"all heads": self.sizes}
            | {
                name: replace(self.sizes, mixer=f"mixture-of-heads:active={fraction},shared=2")
                for fraction, name in names.items()
            },
            settings,
            device=device,
            seeds=self.seeds,
            progress=lambda done: bench.progress(part * done),
        )
        metrics, checks = {f"loss, {name}": over_seeds([x.scores["loss"] for x in found[name]]) for name in found}, {}
        for i, (fraction, name) in enumerate(names.items()):
            fixed = []
            for j, seed in enumerate(self.seeds):
                fixed.append(self.fixed(fraction, replace(settings, seed=seed), device))
                done = (i * len(self.seeds) + j + 1) / (len(names) * len(self.seeds))
                bench.progress(part + (1 - part) * done)
            over_all = differences(found[name], found["all heads"], "loss")
            over_fixed = differences(found[name], fixed, "loss")
            metrics[f"loss, {fraction:.0%} of the heads, the same for all"] = over_seeds(
                [x.scores["loss"] for x in fixed]
            )
            metrics[f"{name}, less all heads"] = over_all
            metrics[f"{name}, less as many fixed ones"] = over_fixed
            checks[f"{name}: better than all heads"] = over_all.high < 0
            checks[f"{name}: better than as many fixed ones"] = over_fixed.high < 0
        checks["with all heads in use and indifferent routers it is multi-head attention"] = self.apart() < 1e-9
        return Finding(metrics, checks)

    def fixed(self, fraction: float, settings: Settings, device: torch.device) -> Learned:
        """Attention that has only its first heads, in training and after it."""
        task = TRAIN_TASKS.parse(self.task)
        model = build(task, self.sizes, seed=settings.seed).to(device)  # type: ignore[arg-type]
        kept = round(fraction * self.sizes.heads) * self.sizes.width // self.sizes.heads

        def first(module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
            return (functional.pad(given[0][..., :kept], (0, given[0].shape[-1] - kept)),)

        for layer in model.layers:
            layer.mixer.out.register_forward_pre_hook(first)  # type: ignore[union-attr, operator]
        report = fit(model, task, settings, show=Show(False))
        return Learned(model, report, {name: each.value for name, each in task.judge(model).items()})

    def apart(self) -> float:
        """How far it is from multi-head attention with the same weights, where nothing is chosen."""
        shape = Shape(self.sizes.width, self.sizes.heads)
        ours = MixtureOfHeads(active=1.0, shared=2).build(shape).double()
        theirs = Softmax().build(shape).double()
        theirs.load_state_dict({name: w for name, w in ours.state_dict().items() if "route" not in name})
        x = torch.randn(2, 16, shape.width, dtype=torch.double)
        with torch.no_grad():
            for name, weight in ours.named_parameters():
                if "route" in name:
                    weight.zero_()
            return float((ours(x)[0] - theirs(x)[0]).abs().max())
