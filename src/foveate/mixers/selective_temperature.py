"""Selective self-attention: each query and each value has a temperature of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Backbone, Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, cached, linear, rotated, split_heads, visible
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import by_seed, differences, over_seeds


@mixer("selective-temperature")
class SelectiveTemperature(Mixer):
    """Softmax attention whose queries and values are multiplied by learned factors, inverse temperatures:

        softmax(t_q(x_i, i) q_i K^T / sqrt(d)) (t_v(x_j) v_j),
        t_q = tanh(w_q . gelu(q_i)) + 1 + s(a) log i,    t_v = tanh(w_v . gelu(v_j)) + 1,    s(a) = exp(-exp(a))

    for each head, i counting tokens from 1. A query's factor says how spiky its attention is, without changing whom it
    resembles; the term with log i works against attention that thins out as a text grows; a value's factor silences
    tokens that are noise. Weights are shared: a factor reads the query or value that is there anyway, so that a head
    adds two vectors of its size and one number. It starts as (nearly) plain attention. Positions are rotary.

    The paper's full text could not be read. Its abstract, summaries and released code (whose position term is
    s(a) log n as above, with a = 2 at the start) are what this is made from. Ours: the small network of the token term,
    one vector per head behind a gelu, and that values have no position term.

    Fields:
        on: `qv`, `q` or `v`: whether queries, values or both have factors.
    """

    paper = Paper(
        "Selective Attention: Enhancing Transformer through Principled Context Control",
        2024,
        "https://arxiv.org/abs/2411.12892",
    )
    claim = "is better than softmax attention at under 0.5% more weights, and its attention thins out less"
    grows = True

    on: str = "qv"

    def __post_init__(self) -> None:
        if self.on not in ("qv", "q", "v"):
            raise FoveateError(f"{self}: there are no factors on {self.on!r}: give qv, q or v.")

    def build(self, shape: Shape) -> TokenMixer:
        if shape.head % 2:
            raise FoveateError(
                f"selective-temperature: rotary positions need heads of an even size, not {shape.head}: give another "
                "number of heads."
            )
        return SelectiveTemperatureMixer(shape, "q" in self.on, "v" in self.on)


class SelectiveTemperatureMixer(TokenMixer):
    """Args: the shape; whether queries have factors; whether values have."""

    def __init__(self, shape: Shape, queries: bool, values: bool):
        super().__init__()
        self.heads, self.head = shape.heads, shape.head
        self.qkv = linear(shape.width, 3 * shape.width)
        self.out = linear(shape.width, shape.width)
        vectors = torch.zeros(shape.heads, shape.head)
        self.query_vectors = nn.Parameter(vectors.clone()) if queries else None
        self.growth = nn.Parameter(torch.full((shape.heads,), 2.0)) if queries else None
        self.value_vectors = nn.Parameter(vectors.clone()) if values else None

    def start(self, batch: int, like: Tensor) -> State:
        empty = like.new_zeros(batch, 0, self.heads, self.head)
        return {"keys": empty, "values": empty, "seen": like.new_zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        at = 0 if state is None else state["seen"]
        q = self.tempered(q, at)
        if self.value_vectors is not None:
            v = v * (1 + _token_term(v, self.value_vectors)).to(v.dtype)
        q, k = rotated(q, at), rotated(k, at)
        if state is not None:
            held, state = cached(state, keys=k, values=v)
            k, v = held["keys"], held["values"]
        return self.out(attend(q, k, v).flatten(2)), state

    def tempered(self, q: Tensor, start: Tensor | int = 0) -> Tensor:
        """Queries (batch, n, heads, d) times their factors; `start` is the position of the first."""
        if self.query_vectors is None or self.growth is None:
            return q
        token = _token_term(q, self.query_vectors)
        count = torch.arange(1, q.shape[1] + 1, device=q.device, dtype=token.dtype)
        count = count + (start.to(token.dtype)[:, None] if isinstance(start, Tensor) else start)
        rate = (-self.growth.to(token.dtype).exp()).exp()
        position = 1 + rate * count.log().view(-1, q.shape[1], 1)
        return q * (token + position.unsqueeze(-1)).to(q.dtype)


def _token_term(x: Tensor, vectors: Tensor) -> Tensor:
    """tanh(w . gelu(x)) for each head, (batch, n, heads, 1), float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (functional.gelu(x.to(dtype)) * vectors.to(dtype)).sum(-1, keepdim=True).tanh()


@torch.no_grad()
def entropies(model: Backbone, ids: Tensor) -> Tensor:
    """The entropy of attention at each token in nats, over layers, heads and texts: (n,). Of rotary softmax attention
    with a `qkv` map, tempered or not."""
    found: list[Tensor] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        heads: int = module.heads  # type: ignore[assignment]
        q, k, _ = split_heads(module.qkv(given[0]), 3 * heads).chunk(3, 2)  # type: ignore[operator]
        q = module.tempered(q) if isinstance(module, SelectiveTemperatureMixer) else q
        logits = torch.einsum("bihd,bjhd->bhij", rotated(q), rotated(k)) / q.shape[-1] ** 0.5
        shares = logits.masked_fill(~visible(q.shape[1], 0, device=q.device), -torch.inf).softmax(-1)
        found.append(torch.special.entr(shares).sum(-1).mean((0, 1)))

    hooks = [layer.mixer.register_forward_pre_hook(look) for layer in model.layers]  # type: ignore[union-attr, operator]
    try:
        model(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).mean(0)


@claim("selective-temperature")
class TemperaturesHelp(Claim):
    statement: ClassVar[str] = (
        "attention whose queries and values have temperatures of their own predicts text better than plain attention, "
        "at under 0.5% more weights; recalls better among distractors; and thins out less as the text grows (abstract)"
    )
    setting: ClassVar[str] = (
        "two layers of width 64: the next byte of prose and code in passages of 256 with plain attention and with "
        "temperatures of queries, of values and of both, 450 steps; recall of 16 values among 128 "
        "tokens (mqar:pairs=16,length=128, a convolution of 3 tokens before each layer) with plain attention and both, "
        "450 steps; 3 seeds, 64 texts a step. "
        "Thinning: how far the entropy of attention rises from tokens 48-64 to tokens 240-256 of test passages"
    )
    reads: ClassVar[bool] = False
    steps: int = 450
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64)
    length: int = 256
    recall: str = "mqar:pairs=16,length=128"

    def run(self, bench: Bench) -> Finding:
        models = {"plain": self.sizes} | {
            on: replace(self.sizes, mixer=f"selective-temperature:on={on}") for on in ("q", "v", "qv")
        }
        settings, device = Settings(steps=self.steps, lr=3e-3), bench.model.device
        text = f"lm:length={self.length}"
        found = by_seed(
            text,
            models,
            settings,
            device=device,  # type: ignore[arg-type]
            seeds=self.seeds,
            progress=lambda done: bench.progress(0.7 * done),
        )
        recalled = by_seed(
            self.recall,
            {name: replace(models[name], conv=3) for name in ("plain", "qv")},
            settings,
            device=device,  # type: ignore[arg-type]
            seeds=self.seeds,
            progress=lambda done: bench.progress(0.7 + 0.3 * done),
        )
        metrics = {f"loss, {name}": over_seeds([x.scores["loss"] for x in found[name]]) for name in found}
        gaps = {name: differences(found[name], found["plain"], "loss") for name in ("q", "v", "qv")}
        metrics |= {f"loss, {name} less plain": gap for name, gap in gaps.items()}
        metrics |= {
            f"recall among distractors, {name}": over_seeds([x.scores["accuracy"] for x in got])
            for name, got in recalled.items()
        }
        better = metrics["recall, qv less plain"] = differences(recalled["qv"], recalled["plain"], "accuracy")
        metrics["loss at recall, qv less plain"] = differences(recalled["qv"], recalled["plain"], "loss")
        rises: dict[str, list[float]] = {"plain": [], "qv": []}
        ids = TRAIN_TASKS.parse(text).batch(32, "test", 0, device).inputs  # type: ignore[arg-type]
        span = self.length // 16
        for name, rows in rises.items():
            for got in found[name]:
                at = entropies(got.model, ids)
                rows.append(float(at[-span:].mean() - at[3 * span : 4 * span].mean()))
        metrics |= {f"rise of the entropy, {name}": over_seeds(rows) for name, rows in rises.items()}
        less = over_seeds([a - b for a, b in zip(rises["qv"], rises["plain"], strict=True)])
        metrics["rise of the entropy, qv less plain"] = less
        counts = [sum(p.numel() for p in found[name][0].model.parameters()) for name in ("plain", "qv")]
        return Finding(
            metrics,
            {
                "text is predicted better": gaps["qv"].high < 0,
                "recall among distractors is better": better.low > 0,
                "attention thins out less": less.high < 0,
                "it has under 0.5% more weights": counts[0] < counts[1] < 1.005 * counts[0],
            },
        )
