"""Key-driven grouped-query attention: KV heads with larger keys serve more query heads."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from foveate.backbone import Backbone, Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, cached, linear, rotated, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes, build
from foveate.train.loop import Settings, fit
from foveate.train.show import Show
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import Learned, by_seed, differences, held_bytes, over_seeds

RULES = ("norms", "average", "change", "random")


@mixer("key-driven-groups")
class KeyDrivenGroups(Mixer):
    """Grouped-query attention whose G groups have unequal numbers of query heads, after the norms of their keys.

    With N_g the norm of all keys of KV head g and s its figure by the rule, group g gets about H s_g / sum(s) of the H
    query heads, in their order:

        norms (KDGQA):    s = (N - min N) / (max N - min N)
        average (DGQA):   s = M, where M becomes newest N + (1 - newest) M at each renewal
        change (DGQA):    s = |N - M|, where M becomes N at each renewal
        random:           none: the groups are drawn once, evenly among all sizes. A control of ours.

    The paper's KDGQA looks at the keys of each forward pass, and so at tokens that come later and at other texts.
    Here a forward uses the groups that it finds in a buffer, which is saved with the weights. Only training passes
    renew it, once they are through: so the groups are those of the keys before, attention is causal, and a text in
    steps is the text at once. Ours as well: every group keeps one query head, and rounding goes by the largest
    remainder (the released code rounds, corrects the sum at random or at the largest and smallest groups, and can
    leave a KV head without queries: with norms and two groups, always one); norms are root mean squares, so that they
    do not hang on the batch; M is a moving average proper. Perturbed groups (PGQA) are not here.

    Fields:
        kv_heads: heads of keys and values.
        rule: `norms`, `average`, `change` or `random`.
        every: training passes from one renewal to the next.
        newest: the weight of the newest norms in the moving average.
    """

    paper = Paper(
        "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
        2024,
        "https://arxiv.org/abs/2408.08454",
    )
    claim = "is better than equal groups with as many KV heads"
    grows = True

    kv_heads: int = 2
    rule: str = "average"
    every: int = 1
    newest: float = 0.9

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise FoveateError(f"{self}: there is no rule {self.rule!r}: give one of {', '.join(RULES)}.")
        if self.kv_heads < 1 or self.every < 1 or not 0 < self.newest <= 1:
            raise FoveateError(f"{self}: kv_heads and every must be 1 or more, newest above 0 and 1 at most.")

    def build(self, shape: Shape) -> TokenMixer:
        if self.kv_heads > shape.heads:
            raise FoveateError(
                f"{self}: {shape.heads} query heads can't be shared out to {self.kv_heads} KV heads, as each serves "
                "one at least: give fewer kv_heads."
            )
        if shape.head % 2:
            raise FoveateError(
                f"key-driven-groups: rotary positions need heads of an even size, not {shape.head}: give another "
                "number of heads."
            )
        return KeyDrivenGroupsMixer(shape, self)


class KeyDrivenGroupsMixer(TokenMixer):
    """Args: the shape; the settings.

    Buffers: `group` (heads,), the KV head of each query head; `norms` (kv_heads,), M; `passes` (), training passes.
    """

    group: Tensor
    norms: Tensor
    passes: Tensor

    def __init__(self, shape: Shape, settings: KeyDrivenGroups):
        super().__init__()
        self.settings, self.heads, self.head, kv_heads = settings, shape.heads, shape.head, settings.kv_heads
        self.qkv = linear(shape.width, (shape.heads + 2 * kv_heads) * shape.head)
        self.out = linear(shape.width, shape.width)
        figures = torch.ones(kv_heads)
        self.register_buffer("group", _shared_out(figures, shape.heads))
        if settings.rule == "random":
            ends = torch.randperm(shape.heads - 1)[: kv_heads - 1].sort().values  # where one group ends, of all places
            self.group = (torch.arange(shape.heads).unsqueeze(1) > ends).sum(1)
        self.register_buffer("norms", torch.zeros(kv_heads))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def start(self, batch: int, like: Tensor) -> State:
        empty = like.new_zeros(batch, 0, self.settings.kv_heads, self.head)
        return {"keys": empty, "values": empty, "seen": like.new_zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        kv_heads = self.settings.kv_heads
        q, k, v = split_heads(self.qkv(x), self.heads + 2 * kv_heads).split([self.heads, kv_heads, kv_heads], 2)
        group = self.group.clone()  # the backward pass needs it as it is now
        if self.training and self.settings.rule != "random":
            self._renew(k.detach())
        at = 0 if state is None else state["seen"]
        q, k = rotated(q, at), rotated(k, at)
        if state is not None:
            held, state = cached(state, keys=k, values=v)
            k, v = held["keys"], held["values"]
        y = attend(q, k.index_select(2, group), v.index_select(2, group))
        return self.out(y.flatten(2)), state

    @torch.no_grad()
    def _renew(self, k: Tensor) -> None:
        """New groups for the next forward, from these keys (batch, n, kv_heads, d)."""
        rule, norms = self.settings.rule, self.norms.to(torch.promote_types(k.dtype, torch.float32))
        now = k.to(norms.dtype).square().sum(-1).mean((0, 1)).sqrt()
        due, first = self.passes % self.settings.every == 0, self.passes == 0
        kept = now
        if rule == "average":
            kept = torch.where(first, now, self.settings.newest * now + (1 - self.settings.newest) * norms)
        figures = {"norms": now - now.min(), "average": kept, "change": (now - norms).abs()}[rule]
        self.group.copy_(torch.where(due, _shared_out(figures, self.heads), self.group))
        self.norms.copy_(torch.where(due, kept, norms))
        self.passes.add_(1)


def _shared_out(figures: Tensor, heads: int) -> Tensor:
    """The group of each of `heads` query heads, (heads,), where groups are as large as their figures say.

    Example:
        >>> _shared_out(torch.tensor([1.0, 3.0]), 8).tolist()
        [0, 0, 1, 1, 1, 1, 1, 1]
    """
    groups = len(figures)
    wanted = heads * figures / figures.sum().clamp_min(1e-12)
    free = (wanted - 1).clamp_min(0)  # each has one, and what is beyond that is shared out
    free = (heads - groups) * free / free.sum().clamp_min(1e-12)
    sizes = free.floor()
    missing = heads - groups - sizes.sum()
    rank = (free - sizes).argsort(descending=True, stable=True).argsort()
    # All figures alike up to rounding can leave more missing than there are groups: they go round.
    sizes = 1 + sizes + (missing / groups).floor() + (rank < missing % groups)
    return (torch.arange(heads, device=figures.device).unsqueeze(1) >= sizes.cumsum(0)).sum(1)


@claim("key-driven-groups")
class KeyDrivenGroupsBeatEqualOnes(Claim):
    statement: ClassVar[str] = (
        "groups of query heads that follow the norms of their KV head's keys are better than equal groups, once a "
        "multi-head model was converted and trained on; the more so where they follow the norms through training"
    )
    setting: ClassVar[str] = (
        "the paper's is image classification with vision transformers, and here it is small language models: two "
        "layers of width 64 with 8 heads learn the next byte of prose and code, 500 steps; their keys and values are "
        "averaged to 4 heads, and they learn on for 250 steps with equal groups, groups by the norms, by their moving "
        "average, by their change, and unequal ones drawn at random; 3 seeds"
    )
    reads: ClassVar[bool] = False
    steps: int = 500
    more: int = 250
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64, heads=8)
    kv_heads: int = 4
    task: str = "lm:length=128"

    def run(self, bench: Bench) -> Finding:
        mixers = {"equal": f"softmax:kv_heads={self.kv_heads}"} | {
            rule: f"key-driven-groups:kv_heads={self.kv_heads},rule={rule}" for rule in RULES
        }
        settings, device = Settings(steps=self.steps, lr=3e-3), bench.model.device
        part = self.steps / (self.steps + len(mixers) * self.more)
        whole = by_seed(
            self.task,
            {"whole": self.sizes},
            settings,
            device=device,
            seeds=self.seeds,
            progress=lambda done: bench.progress(part * done),
        )["whole"]
        found: dict[str, list[Learned]] = {name: [] for name in mixers}
        for i, seed in enumerate(self.seeds):
            for j, (name, text) in enumerate(mixers.items()):
                more = replace(settings, steps=self.more, lr=1e-3, seed=100 + seed)
                found[name].append(self.converted(whole[i], replace(self.sizes, mixer=text), more))
                bench.progress(part + (1 - part) * (i * len(mixers) + j + 1) / (len(self.seeds) * len(mixers)))
        metrics = {"loss, a KV head each": over_seeds([x.scores["loss"] for x in whole])}
        metrics |= {f"loss, groups {name}": over_seeds([x.scores["loss"] for x in found[name]]) for name in found}
        checks = {}
        for rule in ("norms", "average", "change"):
            for other in ("equal", "random"):
                gap = differences(found[rule], found[other], "loss")
                metrics[f"groups by {rule}, less {other} ones"] = gap
                checks[f"groups by {rule} are better than {other} ones"] = gap.high < 0
        held = {held_bytes(found[name][0].model, 64) for name in found}
        checks["all hold as much of a text"] = len(held) == 1
        return Finding(metrics, checks)

    def converted(self, learned: Learned, sizes: Sizes, settings: Settings) -> Learned:
        """A multi-head model whose keys and values are averaged over neighbouring heads, trained on."""
        task = TRAIN_TASKS.parse(self.task)
        model: Backbone = build(task, sizes, seed=settings.seed).to(learned.model.device)  # type: ignore[arg-type]
        weights = learned.model.state_dict()
        for name in [each for each in weights if each.endswith("qkv.weight")]:
            q, *kv = weights[name].chunk(3)
            pooled = [w.unflatten(0, (self.kv_heads, -1, sizes.width // sizes.heads)).mean(1).flatten(0, 1) for w in kv]
            weights[name] = torch.cat([q, *pooled])
        model.load_state_dict(weights, strict=False)  # the groups' buffers start as they are
        report = fit(model, task, settings, show=Show(False))
        return Learned(model, report, {name: each.value for name, each in task.judge(model).items()})
