"""Latent attention: grouped-query attention written as multi-head latent attention, with the same cache or less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.convert.base import Converter
from foveate.convert.rotary import rotary_layers, stand_in
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper, Recipe, Target, apply, check_fraction, method
from foveate.models.anatomy import Anatomy, LayerParts, anatomy
from foveate.portable.latent import LatentAttention
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

RATE = 1e-4
"""Learning rate of the claim's training."""


@method("latent")
class Latent(Converter):
    """Write keys and values as a latent, which is cached, times an up-projection that each head has for itself.

    Grouped-query attention repeats a KV head for the query heads that share it. Here this repetition is an
    up-projection with weights (section 3 of the paper's first versions), so that at `keep=1` the model computes what it
    did, from a cache of the same bytes. Trained on, the up-projections give each head keys and values of its own,
    which grouped-query attention can't, and the cache stays as it is.

    Two things are ours. The keys' up-projection mixes, for each head, complex numbers of one rotary frequency: such
    a map commutes with the rotation, as the paper's later versions use for their rotation of keys across heads. So the
    latent is cached with its positions settled, and up-projections move onto the query and behind the attention: no
    key or value of a head is ever written out. And `keep` below 1 makes the latents smaller: by the principal
    directions of values, and of the keys of a frequency, weighted by what the queries of calibration text have there.

    Attention over a latent of width w costs w / head_dim times that over a head's own keys, in multiplications.

    Fields: `keep`, the fraction of the cache's width that stays.

    Example:
        >>> import foveate as fv, torch
        >>> from foveate.models.caches import cache_bytes, full_cache_bytes
        >>> model, ids = fv.tiny("llama"), torch.arange(1, 41).unsqueeze(0)
        >>> before = model(ids).logits
        >>> with fv.apply(model, "latent"):
        ...     out = model(ids, use_cache=True)
        >>> bool((out.logits - before).abs().max() < 1e-4)
        True
        >>> cache_bytes(out.past_key_values) == full_cache_bytes(model, 40)
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "TransMLA: Multi-head Latent Attention Is All You Need", 2025, "https://arxiv.org/abs/2502.07864"
    )
    claim: ClassVar[str] = "heads get keys and values of their own, to be trained, from a cache that is no larger"

    keep: float = 1.0

    def __post_init__(self) -> None:
        check_fraction(self.name, self.keep)

    def converted(self, target: Target) -> dict[str, nn.Module]:
        parts = anatomy(target.model)
        layers = rotary_layers(self.name, parts)
        if self.keep < 1 and any(hasattr(layer.attention, "k_norm") for layer in layers):
            raise FoveateError(
                f"latent: keep={self.keep} asks for smaller latents, but this {parts.family} model norms its keys "
                "between projection and rotation, so that they can't be cut there: use latent without keep."
            )
        moments = {} if self.keep == 1 else _moments(parts, layers, target.calibration())
        return {
            _path(target.model, layer.attention): _converted(parts, layer, self.keep, moments.get(layer.index))
            for layer in layers
        }


@dataclass
class _Moments:
    """What one layer did on calibration text, in float64.

    Attributes:
        key: (frequency, kv_head, kv_head), complex: mean of k conj(k) over tokens, before the rotation.
        query: (frequency, kv_head): mean of |q|^2 over tokens and the heads that share a KV head.
        value: (kv_heads * head_dim,) squared: mean of v v over tokens.
    """

    key: Tensor
    query: Tensor
    value: Tensor


@torch.no_grad()
def _moments(parts: Anatomy, layers: list[LayerParts], calibration: Tensor) -> dict[int, _Moments]:
    found: dict[int, dict[str, Tensor]] = {layer.index: {} for layer in layers}
    with ExitStack() as hooks:
        for layer in layers:
            for name in "qkv":

                def seen(module: Any, args: Any, out: Tensor, at: tuple[int, str] = (layer.index, name)) -> None:
                    found[at[0]][at[1]] = out[0].double().cpu()

                hooks.callback(getattr(layer, name).register_forward_hook(seen).remove)
        parts.base(calibration, use_cache=False)
    half = parts.head_dim // 2
    moments = {}
    for index, seen_here in found.items():
        query, key = (_complex(seen_here[name], half) for name in "qk")  # (token, head, frequency)
        energy = (query.abs() ** 2).mean(0).unflatten(0, (key.shape[1], -1)).mean(1)
        value = seen_here["v"]
        moments[index] = _Moments(
            torch.einsum("tgf,thf->fgh", key, key.conj()) / len(key), energy.T, value.T @ value / len(value)
        )
    return moments


def _complex(rows: Tensor, half: int) -> Tensor:
    """Rows of heads, each in two halves that turn together, as complex numbers (..., head, half)."""
    real, imaginary = rows.unflatten(-1, (-1, 2, half)).unbind(-2)
    return torch.complex(real, imaginary)


@torch.no_grad()
def _converted(parts: Anatomy, layer: LayerParts, keep: float, moments: _Moments | None) -> LatentAttention:
    own: Any = layer.attention
    weight, half = own.k_proj.weight, parts.head_dim // 2
    kv_heads, heads = own.k_proj.out_features // parts.head_dim, own.q_proj.out_features // parts.head_dim
    full = kv_heads * half
    # Which combination of KV heads each latent number is, and what each KV head gets back: complex (kv_head, full).
    frequency = torch.arange(half).repeat(kv_heads)
    up = torch.eye(kv_heads, dtype=torch.complex128).repeat_interleave(half, dim=1)
    down, v_up = up, torch.eye(2 * full, dtype=torch.float64)
    rank = max(1, round(keep * full))
    if moments is not None:
        # The logits' squared error is |q|^2 |k - k'|^2 on the average: keys count by what queries have there.
        scale = moments.query.sqrt().clamp(min=1e-12)
        size, directions = torch.linalg.eigh(scale[:, :, None] * moments.key * scale[:, None])
        best = size.flatten().topk(rank).indices.sort().values  # frequency by frequency
        frequency = best // kv_heads
        chosen = directions.transpose(1, 2).flatten(0, 1)[best].T  # (kv_head, rank), orthogonal
        down, up = chosen.conj() * scale[frequency].T, chosen / scale[frequency].T
        v_up = torch.linalg.eigh(moments.value).eigenvectors[:, -2 * rank :]
    new = stand_in(LatentAttention, parts.model, layer, k_rank=rank, v_rank=2 * rank)

    def parameter(value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(weight.device, weight.dtype).contiguous(), weight.requires_grad)

    group = heads // kv_heads
    for name, matrix in (("k", lambda rows: _k_down(rows, down, frequency, half)), ("v", lambda rows: v_up.T @ rows)):
        old, small = getattr(own, f"{name}_proj"), getattr(new, f"{name}_down")
        small.weight = parameter(matrix(old.weight.double().cpu()))
        if old.bias is not None:
            small.bias = parameter(matrix(old.bias.double().cpu()[:, None])[:, 0])
    new.k_up = parameter(torch.view_as_real(up.repeat_interleave(group, dim=0)).transpose(1, 2))
    new.v_up = parameter(v_up.unflatten(0, (kv_heads, -1)).repeat_interleave(group, dim=0))
    new.frequency = frequency.to(weight.device)
    return new


def _k_down(rows: Tensor, down: Tensor, frequency: Tensor, half: int) -> Tensor:
    """The map to the latent, (2 * rank, in), of the map to the keys, (kv_heads * head_dim, in)."""
    keys = _complex(rows.T, half)[:, :, frequency]  # (in, kv_head, rank)
    latent = (keys * down).sum(1)
    return torch.cat([latent.real, latent.imag], dim=1).T


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module)


@claim("latent")
class MoreFromTheSameCache(Claim):
    statement: ClassVar[str] = (
        "grouped-query attention can always be written as latent attention with the same cache; trained on, the latent "
        "attention reaches a lower loss than grouped-query attention does (abstract, and the paper's fine-tuning runs)"
    )
    setting: ClassVar[str] = (
        "perplexity of 1,024 tokens of evaluation text: as it is, and after 32 steps of AdamW (1e-4) on 128 tokens of "
        "calibration text each, which train the latent attention's maps for keys and values, up and down, or the "
        "grouped-query attention's own, all else frozen; the rate was picked on calibration text"
    )

    def run(self, bench: Bench) -> Finding:
        model, task = bench.model, Perplexity(tokens=1024, chunk=128)
        streams = Streams(bench, task, of=4)
        ids = tokens(bench.text.evaluation, bench.tokenizer, 256).to(model.device)
        batches = tokens(bench.text.calibration, bench.tokenizer, 32 * 128).to(model.device).view(32, 1, 128)
        full = streams.read("full")
        with torch.no_grad():
            logits = model(ids).logits
        own = [module for layer in anatomy(model).layers for module in (layer.k, layer.v) if module is not None]
        with _trained(model, [p for module in own for p in module.parameters()], batches):
            grouped = streams.read("full")
        with apply(model, "latent"):
            with torch.no_grad():
                difference = float((model(ids).logits - logits).abs().max())
            cache = task.measure(bench, Recipe.of("full")).metrics["cache_fraction"]
            names = ("k_down", "k_up", "v_down", "v_up")
            maps = {n: p for n, p in model.named_parameters() if any(f".{name}" in n for name in names)}
            with _trained(model, [p for n, p in maps.items() if "_up" in n], batches):
                up = streams.read("full")
            with _trained(model, list(maps.values()), batches):
                latent = streams.read("full")
        return Finding(
            {
                "largest difference of logits": Metric.exact(difference),
                "cache, fraction": cache,
                "perplexity, untrained": full.perplexity,
                "over untrained: grouped-query attention trained": grouped.over(full),
                "over untrained: latent attention trained": latent.over(full),
                "over untrained: its up-projections alone trained": up.over(full),
                "latent over grouped-query, both trained": latent.over(grouped),
            },
            {
                "the same logits (to 1e-4)": difference < 1e-4,
                "the same cache": cache.value == 1,
                "training lowers the perplexity of latent attention": latent.below(full),
                "and below that of grouped-query attention, trained as much": latent.below(grouped),
            },
        )


@contextmanager
def _trained(model: PreTrainedModel, weights: list[nn.Parameter], batches: Tensor) -> Iterator[None]:
    """Inside, the weights have been trained on the batches, (steps, 1, tokens), for the claim; all else is frozen."""
    before, asked = [w.detach().clone() for w in weights], {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    try:
        with torch.enable_grad():
            for batch in batches:
                model(batch, labels=batch, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
        for parameter, flag in asked.items():
            parameter.requires_grad_(flag)
