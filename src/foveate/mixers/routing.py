"""Routing Transformer: some heads attend nearby, the others to the tokens of their own cluster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, cached, linear, rotated, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes, build, fit
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import Learned, by_seed, differences, over_seeds


@mixer("routing")
class Routing(Mixer):
    """Local heads see the last `window` tokens. Routing heads have one vector for query and key, normalised to mean 0
    and variance 1, r_t, and see tokens of their own cluster alone:

        c_t = argmin_c |r_t - mu_c|,    y_t = sum_j softmax_j(r_t . r_j / sqrt(d)) v_j over earlier j with c_j = c_t.

    In training the centroids follow the mean m_c of a batch's tokens, mu_c <- decay mu_c + (1 - decay) m_c. They are
    buffers, kept with the weights, and stand still otherwise.

    The paper lets each cluster choose its top w tokens of the whole text, which looks ahead. Here a token belongs to
    its nearest centroid, and sees the last `members` there, itself included: causal, the same step by step, and the
    cost stays at most 2 n times that. The whole text is sorted by cluster and attended to in blocks. With clusters and
    members of about sqrt(n) the cost grows as n^1.5, as in the paper.

    Also ours: a token sees itself only where it sees no other, as its likeness to itself is always the highest; rotary
    positions in the scores, not in the clusters. Several processes that train each follow their own share of a batch.

    Fields:
        clusters: of each routing head.
        members: tokens of a cluster that a token sees at most.
        window: tokens that local heads see at most.
        local_heads: how many heads are local; 0: half of them.
        decay: how slowly centroids follow.
    """

    paper = Paper(
        "Efficient Content-Based Sparse Attention with Routing Transformers", 2020, "https://arxiv.org/abs/2003.05997"
    )
    claim = "finds what is alike far away for a cost that grows as n^1.5"
    grows = True

    clusters: int = 8
    members: int = 32
    window: int = 32
    local_heads: int = 0
    decay: float = 0.999

    def __post_init__(self) -> None:
        if min(self.clusters, self.members, self.window) < 1 or self.local_heads < 0:
            raise FoveateError(f"{self}: clusters, members and window must be 1 or more, local_heads 0 or more.")
        if not 0 <= self.decay < 1:
            raise FoveateError(f"{self}: decay must be at least 0 and below 1, or centroids would never move.")

    def build(self, shape: Shape) -> TokenMixer:
        local = self.local_heads or shape.heads // 2
        if local >= shape.heads:
            raise FoveateError(
                f"routing: of {shape.heads} heads {local} can't be local, as none would be left to route: give fewer "
                "local_heads, or softmax:window=N."
            )
        if shape.head % 2:
            raise FoveateError(
                f"routing: rotary positions need heads of an even size, not {shape.head}: give another number of heads."
            )
        return RoutingMixer(shape, local, self)


class RoutingMixer(TokenMixer):
    """Args: the shape; how many heads are local; the settings."""

    def __init__(self, shape: Shape, local: int, settings: Routing):
        super().__init__()
        self.local, self.routed, self.head = local, shape.heads - local, shape.head
        self.members, self.window, self.decay = settings.members, settings.window, settings.decay
        self.project = linear(shape.width, (3 * local + 2 * self.routed) * shape.head)
        self.out = linear(shape.width, shape.width)
        self.centroids: Tensor
        start = torch.randn(self.routed, settings.clusters, shape.head)
        self.register_buffer("centroids", functional.layer_norm(start, (shape.head,)))

    def start(self, batch: int, like: Tensor) -> State:
        near, far = like.new_zeros(batch, 0, self.local, self.head), like.new_zeros(batch, 0, self.routed, self.head)
        integers = like.new_zeros(batch, 0, self.routed, dtype=torch.long)
        state = {"shared": far, "routed": far, "which": integers, "seen": like.new_zeros(batch, dtype=torch.long)}
        return {**state, "keys": near, "values": near} if self.local else state

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        at = 0 if state is None else state["seen"]
        sizes = [self.routed, self.routed, self.local, self.local, self.local]
        shared, values, q, k, v = split_heads(self.project(x), sum(sizes)).split(sizes, 2)
        shared = functional.layer_norm(shared.to(torch.promote_types(x.dtype, torch.float32)), (self.head,))
        which = self.nearest(shared)
        if self.training:
            self._follow(shared, which)
        shared = rotated(shared, at).to(values.dtype)
        q, k = rotated(q, at), rotated(k, at)
        after: State | None = None
        if state is not None:
            held, after = cached(state, shared=shared, routed=values, which=which)
            shared, values, which = held["shared"], held["routed"], held["which"]
            if self.local:
                held, more = cached(state, self.window - 1, keys=k, values=v)
                k, v, after = held["keys"], held["values"], {**after, **more}
        if state is not None and x.shape[1] == 1:
            far = last_in_cluster(shared, values, which, self.members)
        else:
            far = in_clusters(shared, values, which, self.members)[:, -x.shape[1] :]
        y = torch.cat([attend(q, k, v, window=self.window), far], 2) if self.local else far
        return self.out(y.flatten(2)), after

    def nearest(self, shared: Tensor) -> Tensor:
        """The nearest centroid of each token and head: (batch, n, heads, d) to int64 (batch, n, heads)."""
        centroids = self.centroids.to(shared.dtype)
        with torch.autocast(shared.device.type, enabled=False):
            likeness = torch.einsum("bnhd,hcd->bnhc", shared, centroids)
        return (likeness - centroids.square().sum(-1) / 2).argmax(-1)

    @torch.no_grad()
    def _follow(self, shared: Tensor, which: Tensor) -> None:
        heads, clusters, head = self.centroids.shape
        places = (which + clusters * torch.arange(heads, device=which.device)).flatten()
        sums = shared.new_zeros(heads * clusters, head).index_add(0, places, shared.flatten(0, 2))
        counts = shared.new_zeros(heads * clusters).index_add(0, places, torch.ones_like(shared[..., 0]).flatten())
        moved = torch.lerp(
            sums / counts.clamp_min(1).unsqueeze(-1), self.centroids.to(sums.dtype).flatten(0, 1), self.decay
        )
        there = (counts > 0).view(heads, clusters, 1)  # a cluster without tokens stays where it is
        self.centroids.copy_(torch.where(there, moved.view_as(self.centroids), self.centroids))


def in_clusters(shared: Tensor, values: Tensor, which: Tensor, members: int) -> Tensor:
    """Each token attends to the last `members` of its cluster: sorted by cluster these stand side by side.

    Args:
        shared: queries that are the keys too, (batch, n, heads, d).
        values: (batch, n, heads, e).
        which: the clusters, int64 (batch, n, heads).

    Returns:
        (batch, n, heads, e).
    """
    n = which.shape[1]
    size = min(members, n)
    order = which.argsort(dim=1, stable=True)
    q, v = (x.gather(1, order.unsqueeze(-1).expand_as(x)) for x in (shared, values))
    pad = -n % size
    q, v = (functional.pad(x, (0, 0, 0, 0, 0, pad)).transpose(1, 2).unflatten(2, (-1, size)) for x in (q, v))
    c = functional.pad(which.gather(1, order), (0, 0, 0, pad), value=-1).transpose(1, 2).unflatten(2, (-1, size))
    k, v = (torch.cat([functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], 3) for x in (q, v))
    c_k = torch.cat([functional.pad(c, (0, 0, 1, 0), value=-2)[:, :, :-1], c], 3)
    i = torch.arange(size, device=c.device)[:, None] + size
    j = torch.arange(2 * size, device=c.device)
    seen = (c.unsqueeze(-1) == c_k.unsqueeze(-2)) & (j < i) & (j > i - size)  # batch, heads, blocks, size, 2 size
    seen = seen | (~seen.any(-1, keepdim=True) & (j == i))
    q, k, v, seen = (
        x.flatten(1, 2) for x in (q, k, v, seen)
    )  # blocks stand as heads, so that attention is called once
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    y = y.unflatten(1, (which.shape[2], -1)).flatten(2, 3)[:, :, :n].transpose(1, 2)
    return torch.zeros_like(y).scatter(1, order.unsqueeze(-1).expand_as(y), y)


def last_in_cluster(shared: Tensor, values: Tensor, which: Tensor, members: int) -> Tensor:
    """The same for the last token alone: (batch, 1, heads, e). Only its cluster's keys and values are read."""
    n = which.shape[1]
    places = torch.arange(n, device=which.device).view(1, n, 1)
    latest, index = torch.where(which == which[:, -1:], places, -1).topk(min(members, n), 1)
    k, v = (x.gather(1, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])).transpose(1, 2) for x in (shared, values))
    seen = (latest >= 0) & (latest < n - 1)
    seen = (seen | (~seen.any(1, keepdim=True) & (latest == n - 1))).transpose(1, 2).unsqueeze(2)
    y = functional.scaled_dot_product_attention(shared[:, -1:].transpose(1, 2), k, v, attn_mask=seen)
    return y.transpose(1, 2)


@claim("routing")
class RoutingClaim(Claim):
    statement: ClassVar[str] = (
        "attention within online k-means clusters costs n^1.5, is dense attention where there is one cluster, and "
        "beside local heads recalls what local attention can't reach, and better than clusters at random"
    )
    setting: ClassVar[str] = (
        "2 layers of width 64 learn to recall 8 values by their keys in 128 tokens, 1,000 steps of 64 texts, 2 seeds, "
        "all with local attention to 16 tokens: in all 4 heads; in 2 of 4, with 8 clusters of 16 tokens in the others; "
        "the same with clusters at random; and the time of clustered attention with sqrt(n) clusters and members"
    )
    reads = False
    steps: int = 1000
    seeds: tuple[int, ...] = (0, 1)
    width: int = 64
    lengths: tuple[int, int] = (16384, 65536)
    pairs: int = 8
    length: int = 128

    def run(self, bench: Bench) -> Finding:
        device = bench.model.device
        task = f"mqar:pairs={self.pairs},length={self.length},vocab=64"
        routing = Sizes(width=self.width, conv=3, mixer="routing:clusters=8,members=16,window=16,decay=0.99")
        models = {"routing": routing, "local": replace(routing, mixer="softmax:window=16")}
        settings = Settings(steps=self.steps, lr=2e-3)
        found = by_seed(
            task, models, settings, device=device, seeds=self.seeds, progress=lambda part: bench.progress(2 / 3 * part)
        )
        found["at random"] = [
            _at_random(task, routing, replace(settings, seed=seed), device=device) for seed in self.seeds
        ]
        bench.progress(0.95)
        over_local, over_random = (
            differences(found["routing"], found[name], "accuracy") for name in ("local", "at random")
        )
        short, long = self.lengths
        made = [_scores(n, math.isqrt(n)) for n in self.lengths]
        taken = [_seconds(n, math.isqrt(n), device) for n in self.lengths]
        entries, seconds = (math.log(after / before) / math.log(long / short) for before, after in (made, taken))
        wrong = _dense(device)
        return Finding(
            {
                **{
                    f"accuracy of recall, {name}": over_seeds([each.scores["accuracy"] for each in runs])
                    for name, runs in found.items()
                },
                "accuracy over local attention's": over_local,
                "accuracy over that of clusters at random": over_random,
                "scores grow with the length to the power": Metric.exact(entries),
                f"time grows to the power, {short:,} to {long:,} tokens": Metric.exact(seconds),
                "largest difference of one cluster from dense attention": Metric.exact(wrong),
            },
            {
                "time grows by a power below 1.75": seconds < 1.75,
                "one cluster is dense attention": wrong < 1e-5,
                "it recalls more than local attention": over_local.low > 0,
                "it recalls more than with clusters at random": over_random.low > 0,
            },
        )


def _at_random(task: str, sizes: Sizes, settings: Settings, *, device: torch.device) -> Learned:
    """The same model and training, but clusters hang on places in a text, at random, and not on what stands there."""
    learned_task = TRAIN_TASKS.parse(task)
    model = build(learned_task, sizes, seed=settings.seed).to(device)  # type: ignore[arg-type]

    def drawn(clusters: int, layer: int) -> Callable[[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(layer)
        table = torch.randint(clusters, (learned_task.tokens, sizes.heads), generator=generator).to(device)
        return lambda shared: table[: shared.shape[1], : shared.shape[2]].expand(shared.shape[0], -1, -1)

    for i, layer in enumerate(model.layers):
        layer.mixer.nearest = drawn(layer.mixer.centroids.shape[1], i)  # type: ignore[union-attr, operator]
    report = fit(model, learned_task, settings)
    return Learned(model, report, {name: each.value for name, each in learned_task.judge(model).items()})


def _scores(n: int, members: int) -> int:
    """Scores that `in_clusters` makes for a head."""
    return -(-n // members) * members * 2 * members


@torch.no_grad()
def _seconds(n: int, clusters: int, device: torch.device) -> float:
    """The time of routing and attention of one text, the best of three."""
    torch.manual_seed(0)
    module = RoutingMixer(Shape(64, 4), 3, Routing(clusters=clusters)).to(device)
    shared = functional.layer_norm(torch.randn(1, n, 1, 16, device=device), (16,))
    best = math.inf
    for _ in range(4):
        begin = time.perf_counter()
        y = in_clusters(shared, shared, module.nearest(shared), clusters)
        float(y.sum())  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return best


@torch.no_grad()
def _dense(device: torch.device, n: int = 100) -> float:
    """How far attention in one cluster is from attention to all earlier tokens."""
    torch.manual_seed(0)
    shared, values = torch.randn(2, 2, n, 4, 16, device=device).unbind(0)
    y = in_clusters(shared, values, torch.zeros(2, n, 4, dtype=torch.long, device=device), n)
    scores = torch.einsum("bihd,bjhd->bhij", shared, shared) / 4
    seen = torch.ones(n, n, dtype=torch.bool, device=device).tril(-1)
    seen[0, 0] = True
    plain = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values.transpose(1, 2)
    return float((y - plain.transpose(1, 2)).abs().max())
