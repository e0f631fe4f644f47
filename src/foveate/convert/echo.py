"""Echo: layers that attend much as an earlier layer did use its attention, and lose their queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.convert.base import Converter
from foveate.convert.rotary import rotary_layers, stand_in
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper, Recipe, Target, method
from foveate.models.anatomy import LayerParts, anatomy
from foveate.portable.echo import EchoAttention, SharingAttention
from foveate.scores.similarity import map_similarity
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity
from foveate.tasks.speed import Speed

PIECE = 256
"""Tokens a forward in which attention is compared: its weights are held for all layers at once."""


@method("echo")
class Echo(Converter):
    """Inner layers reuse the attention of an earlier layer over values of their own, where the two are most similar.

    Similarity is the cosine between two layers' attention weights, head by head and query by query, on calibration
    text. The layers that share make blocks of neighbours, as in the paper: the first of a block attends, the others
    echo it. They need no queries and keys, so their maps go, and their keys leave the cache.

    Ours: the number of layers that echo is given, not a threshold; they are picked one by one, each time the one with
    which the similarities of all echoes to the heads of their blocks add up to most. The first and the last layer
    stay as they are. The paper then distils; this is the model before that.

    Fields: `layers`, how many layers echo.

    Example:
        >>> import foveate as fv, torch
        >>> model, ids = fv.tiny("llama"), torch.arange(1, 41).unsqueeze(0)
        >>> with fv.apply(model, "echo:layers=1", calibration=ids):
        ...     [type(layer.attention).__name__ for layer in fv.anatomy(model).layers].count("EchoAttention")
        1
    """

    paper: ClassVar[Paper | None] = Paper(
        "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
        2024,
        "https://arxiv.org/abs/2409.14595",
    )
    claim: ClassVar[str] = "inner layers attend so much alike that some can use the attention of the layer before"

    layers: int

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise FoveateError(f"echo: layers={self.layers} echoes nothing: give the number of layers that echo.")

    def converted(self, target: Target) -> dict[str, nn.Module]:
        parts = anatomy(target.model)
        layers = rotary_layers(self.name, parts)
        able = may_echo(layers)
        if self.layers > len(able):
            raise FoveateError(
                f"echo: {self.layers} layers were to echo an earlier one, but only {len(able)} of this model can: not "
                f"the first, not the last, none after a layer of another attention window. Give at most {len(able)}."
            )
        sources = self.sources(target, layers, able)
        modules: dict[str, nn.Module] = {}
        paths = {id(module): path for path, module in target.model.named_modules()}
        for layer in layers:
            echoes = list(sources.values()).count(layer.index)
            if layer.index in sources:
                new: nn.Module = stand_in(EchoAttention, target.model, layer, source=sources[layer.index])
            elif echoes:
                new = stand_in(SharingAttention, target.model, layer, echoes=echoes)
            else:
                continue
            modules[paths[id(layer.attention)]] = new
        return modules

    def sources(self, target: Target, layers: list[LayerParts], able: list[int]) -> dict[int, int]:
        """Index of each layer that echoes -> index of the layer that it echoes."""
        return most_similar(attention_similarity(target.model, layers, target.calibration()), layers, able, self.layers)


def may_echo(layers: list[LayerParts]) -> list[int]:
    """Places in `layers` that may echo the place before: inner ones, with as many heads and the same window."""

    def shape(layer: LayerParts) -> tuple[object, ...]:
        q, k = layer.q, layer.k
        assert q is not None and k is not None  # by rotary_layers
        return layer.sliding_window, q.out_features, k.out_features

    return [at for at in range(1, len(layers) - 1) if shape(layers[at]) == shape(layers[at - 1])]


def blocks(places: set[int]) -> dict[int, int]:
    """Each place that echoes -> the first of its block: the nearest place before it that doesn't echo."""
    heads: dict[int, int] = {}
    for at in sorted(places):
        heads[at] = heads.get(at - 1, at - 1)
    return heads


def most_similar(similarity: Tensor, layers: list[LayerParts], able: list[int], count: int) -> dict[int, int]:
    """The layers that echo, and whom: picked one by one by the sum of the similarities within blocks.

    Args:
        similarity: (layers, layers), between places in `layers`.
        able: the places that may echo.
    """
    chosen: set[int] = set()

    def total(places: set[int]) -> float:
        return sum(float(similarity[head, at]) for at, head in blocks(places).items())

    for _ in range(count):
        chosen.add(max((at for at in able if at not in chosen), key=lambda at: total(chosen | {at})))
    return {layers[at].index: layers[head].index for at, head in blocks(chosen).items()}


@torch.no_grad()
def attention_similarity(model: PreTrainedModel, layers: list[LayerParts], calibration: Tensor) -> Tensor:
    """Cosine between the attention weights of every two layers, a mean over queries and heads: (layers, layers).

    Pairs of layers of different numbers of heads have NaN.
    """
    total = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    found: list[Tensor | None] = [None] * len(layers)
    with _eager(model):
        for piece in calibration[0].split(PIECE):
            hooks = []
            for at, layer in enumerate(layers):

                def seen(module: nn.Module, args: object, out: tuple[Tensor, Tensor], at: int = at) -> None:
                    found[at] = out[1][0]

                hooks.append(layer.attention.register_forward_hook(seen))
            try:
                anatomy(model).base(piece[None], use_cache=False)
            finally:
                for hook in hooks:
                    hook.remove()
            total += map_similarity(found) * len(piece) / calibration.shape[1]
    return total


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Inside, attention gives its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True, kw_only=True)
class _EchoRandom(Echo):
    """The control, for the claim: layers drawn at random."""

    seed: int

    def sources(self, target: Target, layers: list[LayerParts], able: list[int]) -> dict[int, int]:
        order = torch.randperm(len(able), generator=torch.Generator().manual_seed(self.seed)).tolist()
        drawn = blocks({able[at] for at in order[: self.layers]})
        return {layers[at].index: layers[head].index for at, head in drawn.items()}


@claim("echo")
class SimilarLayersCanShare(Claim):
    statement: ClassVar[str] = (
        "many inner layers have highly similar attention, and sharing it there costs little: with distillation, which "
        "this experiment leaves out, 15% more inference speed at 4% fewer parameters and no loss (abstract)"
    )
    setting: ClassVar[str] = (
        "4 layers echo, picked on 2,048 tokens of calibration text; 1,024 tokens of evaluation text; against two "
        "random sets of 4 inner layers; parameters and speed also with as many echoes as make 4% of the parameters "
        "(12 in SmolLM2-135M), decoding after a prompt of 256 tokens in alternation with the whole model"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=1024, chunk=128), of=5)
        parts = anatomy(bench.model)
        first, whole = parts.layers[0], sum(p.numel() for p in bench.model.parameters())
        saved = sum(p.numel() for module in (first.q, first.k) if module is not None for p in module.parameters())
        many = min(max(1, round(0.04 * whole / saved)), len(parts.layers) - 2)
        full, few = streams.read("full"), streams.read(Echo(layers=4))
        random = [streams.read(_EchoRandom(layers=4, seed=seed)) for seed in (0, 1)]
        more = streams.read(Echo(layers=many))
        speed = Speed(prompt=256, tokens=16, repeats=9).measure(bench, Recipe.of(Echo(layers=many))).metrics
        return Finding(
            {
                "perplexity, whole model": full.perplexity,
                "over whole: 4 most similar layers": few.over(full),
                "over whole: 4 random layers, first set": random[0].over(full),
                "over whole: 4 random layers, second set": random[1].over(full),
                f"over whole: {many} most similar layers": more.over(full),
                f"cache, fraction, {many} layers": speed["cache_fraction"],
                f"parameters, fraction, {many} layers": Metric.exact(speed["parameters"].value / whole),
                f"prefill speed-up, {many} layers": speed["prefill_speedup"],
                f"decode speed-up, {many} layers": speed["decode_speedup"],
            },
            {
                "4 layers: little loss without distillation (within 5%)": few.over(full).value < 1.05,
                "better than both random sets": all(few.below(other) for other in random),
                f"{many} layers: as many parameters less as queries and keys have": speed["parameters"].value
                == whole - many * saved,
                f"{many} layers: decoding is 15% faster": speed["decode_speedup"].value >= 1.15,
            },
        )
