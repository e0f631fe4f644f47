"""Duo-LLM: a small MLP beside the big one, and a choice between them, or neither, for each token in each layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import (
    CHANNELS,
    Backbone,
    BackboneConfig,
    BackboneForCausalLM,
    Channel,
    ChannelMixer,
    Shape,
    channel,
)
from foveate.backbone.parts import linear
from foveate.blocks.channels.gated import GatedMixer
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes, fit
from foveate.train.tasks import TRAIN_TASKS, Batch
from foveate.train.trial import learned, over_seeds

SKIP, SMALL, BIG = 0, 1, 2
ROUTES = ("random", "router")


@channel("duo")
class Duo(Channel):
    """Each token takes one of three ways through each layer's channel mixer: none, the small gated MLP, the big one.

    The paper's three stages are: train with `route=random`, where tokens choose ways at random and so all ways come to
    work together (evaluation takes the big MLPs); train routers on top (`with_router`); and compare them with what an
    oracle finds, which tries all ways through the model (`oracle`).

    Ours, as the paper's text was not at hand: the three ways are drawn equally often in stage one; a router is a linear
    map in each layer that takes its most likely way and learns through its softmax (straight-through); it adds `price`
    times the fraction of the big MLPs' work that it expects to spend to the loss.

    Fields:
        big, small: channels inside the MLPs, as multiples of the width; rounded to multiples of 8.
        route: `random` or `router`.
        price: of the router: nats a token that all of the big MLPs' work costs.
    """

    paper = Paper(
        "Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
        2024,
        "https://arxiv.org/abs/2410.10846",
    )
    claim = "shows how much better work can be spread over tokens and layers than trained routers spread it"

    big: float = 2.67
    small: float = 0.33
    route: str = "random"
    price: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.small < self.big:
            raise FoveateError(f"{self}: small must be above 0 and below big.")
        if self.route not in ROUTES:
            raise FoveateError(f"duo: there is no route {self.route!r}: give {' or '.join(ROUTES)}.")
        if self.price < 0:
            raise FoveateError(f"{self}: price must be 0 or more.")

    def build(self, shape: Shape) -> ChannelMixer:
        big, small = (max(8, 8 * round(times * shape.width / 8)) for times in (self.big, self.small))
        return DuoMixer(shape, big, small, self.price if self.route == "router" else None)


class DuoMixer(ChannelMixer):
    """Args: the shape; channels inside the two MLPs; the router's price, or None: no router.

    Attributes:
        forced: ways that tokens take instead, 0 none, 1 small, 2 big: int64, (batch, n) or what broadcasts to it.
        taken: the ways that were taken last, (batch, n).
        costs: of the three ways, as parts of the big MLP's work.
    """

    forced: Tensor | None = None
    taken: Tensor | None = None

    def __init__(self, shape: Shape, big: int, small: int, price: float | None):
        super().__init__()
        self.big, self.small = GatedMixer(shape.width, big), GatedMixer(shape.width, small)
        self.costs = (0.0, small / big, 1.0)
        self.router = None if price is None else linear(shape.width, 3)
        self.price = 0.0 if price is None else price / shape.layers

    def writers(self) -> list[Tensor]:
        """What writes into the residual stream; the backbone decides how small it starts."""
        return [self.big.out.weight, self.small.out.weight]

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor | None = None
        self.extra_loss = None
        if self.forced is not None:
            ways = self.forced.expand(x.shape[:2])
        elif self.router is not None:
            logits = self.router(x)
            p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            ways = p.argmax(-1)
            if self.training:
                weights = functional.one_hot(ways, 3) + p - p.detach()
                self.extra_loss = self.price * (p * p.new_tensor(self.costs)).sum(-1).mean()
        elif self.training:
            ways = torch.randint(0, 3, x.shape[:2], device=x.device)
        else:
            ways = torch.full(x.shape[:2], BIG, device=x.device)
        self.taken = ways
        if not self.training:
            return self._sent(x, ways)
        # In training all is computed for all tokens, with shapes that hang on no choice.
        if weights is None:
            weights = functional.one_hot(ways, 3)
        weights = weights.to(x.dtype)
        return weights[..., SMALL, None] * self.small(x) + weights[..., BIG, None] * self.big(x)

    def _sent(self, x: Tensor, ways: Tensor) -> Tensor:
        """Each token through its way alone."""
        y = torch.zeros_like(x)
        for way, module in ((SMALL, self.small), (BIG, self.big)):
            there = ways == way
            y[there] = module(x[there]).to(x.dtype)
        return y


def duos(model: Backbone) -> list[DuoMixer]:
    """The channel mixers of a model whose layers all are `duo`. Raises FoveateError where they are not."""
    found = [layer.channel for layer in model.layers]
    if not all(isinstance(each, DuoMixer) for each in found) or model.config.stack != "plain":
        raise FoveateError(
            f"this model has channel={model.config.channel} and stack={model.config.stack}, and tokens can only choose "
            "their ways in a plain stack of duo layers: build one with channel=duo and stack=plain."
        )
    return found  # type: ignore[return-value]


@contextmanager
def sent(model: Backbone, ways: Tensor) -> Iterator[None]:
    """Inside, tokens take the ways given.

    Args:
        ways: 0 none, 1 small, 2 big: int64 (batch, n, layers), or what broadcasts to it.
    """
    modules = duos(model)
    ways = ways.to(model.device)
    for i, module in enumerate(modules):
        module.forced = ways[..., i]
    try:
        yield
    finally:
        for module in modules:
            module.forced = None


def spent(model: Backbone) -> float:
    """What tokens spent in the last forward, as a fraction of the big MLPs' work in all layers."""
    parts = []
    for each in duos(model):
        assert each.taken is not None
        parts.append(float(torch.tensor(each.costs, device=each.taken.device)[each.taken].mean()))
    return sum(parts) / len(parts)


def with_router(model: BackboneForCausalLM, *, price: float = 0.02, seed: int = 0) -> BackboneForCausalLM:
    """A copy of a model with new routers in all layers, in which nothing but them learns.

    Args:
        price: see `Duo`.
        seed: of the routers' weights; PyTorch's global generator is left as it was.
    """
    duos(model)
    config: BackboneConfig = copy.deepcopy(model.config)  # type: ignore[assignment]
    config.channel = replace(cast(Duo, CHANNELS.parse(config.channel)), route="router", price=price).to_text()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        routed = BackboneForCausalLM(config)
    routed.load_state_dict(model.state_dict(), strict=False)
    for name, weight in routed.named_parameters():
        weight.requires_grad_(".channel.router." in name)
    return routed.to(model.device)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OracleRoutes:
    """What an oracle found.

    Attributes:
        paths: ways through the layers that keep to the budget, cheapest first, int64 (paths, layers).
        costs: of each, as a fraction of the big MLPs' work in all layers, (paths,).
        losses: nats of the next token by each path, (batch, n - 1, paths), the tokens before having taken their best.
        best: the path that lost least, (batch, n - 1).
    """

    paths: Tensor
    costs: Tensor
    losses: Tensor
    best: Tensor

    @property
    def ways(self) -> Tensor:
        """What `sent` takes, (batch, n - 1, layers)."""
        return self.paths[self.best]

    @property
    def loss(self) -> Tensor:
        """Nats by the best path, (batch, n - 1)."""
        return self.losses.gather(-1, self.best.unsqueeze(-1)).squeeze(-1)

    @property
    def cost(self) -> Tensor:
        """Of the best path, (batch, n - 1)."""
        return self.costs[self.best]

    @property
    def difficulty(self) -> Tensor:
        """What a token stands to gain from work: nats by the cheapest path over those by the best, (batch, n - 1)."""
        return self.losses[..., 0] - self.loss


@torch.no_grad()
def oracle(model: BackboneForCausalLM, ids: Tensor, *, budget: float = 1.0) -> OracleRoutes:
    """Try all paths of each token, 3 to the number of layers, and let it take the one that predicts what is next best.

    Texts go token by token: those before a token took their own best paths, and so the loss is what the model has where
    tokens are sent by the paths found. It is a bound, and no way to predict, as it looks at the token to come.

    Args:
        ids: (batch, n), n 2 or more.
        budget: what each token may spend at most, as a fraction of the big MLPs' work in all layers.

    Raises:
        FoveateError: other channel mixers, too many layers to try all paths, a budget below 0, no next token.

    Example:
        >>> from foveate.train import Sizes, build
        >>> model = build(TRAIN_TASKS.parse("lm"), Sizes(width=32, channel="duo"))
        >>> found = oracle(model, torch.tensor([[10, 20, 30]]), budget=0.5)
        >>> found.losses.shape, found.best.shape, bool((found.cost <= 0.5).all())
        (torch.Size([1, 2, 6]), torch.Size([1, 2]), True)
    """
    modules, device = duos(model), model.device
    if len(modules) > 8:
        raise FoveateError(f"an oracle can't try the 3^{len(modules)} paths of {len(modules)} layers: give 8 or fewer.")
    if budget < 0 or ids.shape[1] < 2:
        raise FoveateError("an oracle needs a budget of 0 or more, and texts of 2 tokens or more.")
    paths = torch.cartesian_prod(*[torch.arange(3)] * len(modules)).view(-1, len(modules))
    costs = torch.tensor([each.costs for each in modules])[torch.arange(len(modules)), paths].mean(1)
    order = costs.argsort(stable=True)
    order = order[costs[order] <= budget + 1e-6]
    paths, costs = paths[order].to(device), costs[order].to(device)
    batch, count = len(ids), len(paths)
    ids, training = ids.to(device), model.training
    model.eval()
    rows = torch.arange(batch, device=device)
    losses, best = [], []
    cache = None
    with sent(model, paths.repeat(batch, 1).unsqueeze(1)):
        for t in range(ids.shape[1] - 1):
            if cache is not None:  # each text's best path is where all its paths go on from
                cache.batch_select_indices((rows * count + best[-1]).repeat_interleave(count))
            out = model(ids[:, t : t + 1].repeat_interleave(count, 0), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            next_ids = ids[:, t + 1].repeat_interleave(count)
            losses.append(
                functional.cross_entropy(out.logits[:, -1].float(), next_ids, reduction="none").view(batch, -1)
            )
            best.append(losses[-1].argmin(1))
    model.train(training)
    return OracleRoutes(paths, costs, torch.stack(losses, 1), torch.stack(best, 1))


@claim("duo")
class DuoClaim(Claim):
    statement: ClassVar[str] = (
        "an oracle with the work of one big module predicts better than big modules in all layers, and a trained "
        "router stays far behind an oracle with as much to spend, nearer to random ways"
    )
    setting: ClassVar[str] = (
        "byte models of 4 layers and width 64 learn prose and code with ways drawn at random, 1,200 steps of 32 "
        "passages of 128 bytes, 3 seeds; then routers alone learn for 400 steps, at half the price that big MLPs save "
        "against none, so that work is worth while where it saves half as much as on average. On 8 test passages "
        "oracles try all paths of each token, with as much work as the router spends, and as one big module and small "
        "ones take. An oracle sees the token to come, and so is a bound; random ways are drawn as often as the router "
        "takes each"
    )
    reads = False
    steps: int = 1200
    router_steps: int = 400
    layers: int = 4
    width: int = 64
    length: int = 128
    texts: int = 8
    draws: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)

    def run(self, bench: Bench) -> Finding:
        task = TRAIN_TASKS.parse(f"lm:length={self.length}")
        found: dict[str, list[float]] = {}

        def note(name: str, value: float) -> None:
            found.setdefault(name, []).append(value)

        for i, seed in enumerate(self.seeds):
            settings = Settings(steps=self.steps, batch=32, seed=seed)
            model = learned(
                task, Sizes(width=self.width, layers=self.layers, channel="duo"), settings, device=bench.model.device
            ).model
            assert isinstance(model, BackboneForCausalLM)
            seen = task.batch(64, "validation", 0, model.device, seed=1_000_003)
            none, all_big = (_nats(model, seen, torch.full((self.layers,), way)) for way in (SKIP, BIG))
            router = with_router(model, price=max(0.0, none - all_big) / 2, seed=seed)
            fit(router, task, replace(settings, steps=self.router_steps))
            bench.progress((i + 0.8) / len(self.seeds))
            drawn = task.batch(self.texts, "test", 0, model.device, seed=1_000_003)
            ids = torch.cat([drawn.inputs, drawn.targets[:, -1:]], 1)
            small = duos(model)[0].costs[SMALL]
            for name, way in (("skipping all", SKIP), ("small everywhere", SMALL), ("big everywhere", BIG)):
                note(name, _nats(model, drawn, torch.full((self.layers,), way)))
            note("router", _nats(router, drawn))
            cost = spent(router)
            note("work of the router", cost)
            shares = torch.stack([each.taken.flatten() for each in duos(router)])  # type: ignore[union-attr]
            note("random ways, as often as the router's", self._random(model, drawn, shares.flatten().cpu(), seed))
            one = (1 + (self.layers - 1) * small) / self.layers
            for name, budget in (("oracle with the router's work", cost), ("oracle with the work of one big", one)):
                routes = oracle(model, ids, budget=budget)
                note(name, float(routes.loss.mean()))
                note(f"work of the {name}", float(routes.cost.mean()))
            bench.progress((i + 1) / len(self.seeds))

        def less(a: str, b: str) -> Metric:
            return over_seeds([x - y for x, y in zip(found[a], found[b], strict=True)])

        one_less = less("oracle with the work of one big", "big everywhere")
        behind = less("router", "oracle with the router's work")
        ahead = less("random ways, as often as the router's", "router")
        lead = over_seeds([  # how much of the way from random to the oracle the router goes
            (r - x) / (r - o)
            for r, x, o in zip(
                found["random ways, as often as the router's"],
                found["router"],
                found["oracle with the router's work"],
                strict=True,
            )
        ])  # fmt: skip
        return Finding(
            {
                **{
                    name if name.startswith("work") else f"nats a byte, {name}": over_seeds(values)
                    for name, values in found.items()
                },
                "oracle with the work of one big less big everywhere": one_less,
                "router less oracle of as much work": behind,
                "random less router": ahead,
                "part of the way from random to the oracle that the router goes": lead,
            },
            {
                "the oracle with the work of one big module predicts better than big everywhere": one_less.high < 0,
                "the router predicts worse than an oracle with as much work": behind.low > 0,
                "the router is nearer to random ways than to the oracle": lead.high < 0.5,
            },
        )

    def _random(self, model: Backbone, drawn: Batch, ways: Tensor, seed: int) -> float:
        """The mean loss where each token draws its ways from those."""
        generator = torch.Generator().manual_seed(seed)
        total = 0.0
        for _ in range(self.draws):
            picked = torch.randint(len(ways), (*drawn.inputs.shape, self.layers), generator=generator)
            total += _nats(model, drawn, ways[picked]) / self.draws
        return total


@torch.no_grad()
def _nats(model: Backbone, batch: Batch, ways: Tensor | None = None) -> float:
    """The mean loss, where ways are given by them."""
    if ways is None:
        return float(model(batch.inputs, targets=batch.targets).loss)
    with sent(model, ways):
        return float(model(batch.inputs, targets=batch.targets).loss)
