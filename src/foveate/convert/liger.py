"""Liger: attention becomes a gated recurrence whose gates are the pretrained keys, half of it a sliding window."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from foveate.claims import Claim, Finding, Streams, claim
from foveate.convert.base import Converter
from foveate.convert.linear import layers_to_convert, path_of, stand_in
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.heal.trial import ON_CPU, ON_GPU, recovered
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper, Target, apply, method
from foveate.models.anatomy import anatomy
from foveate.models.caches import cache_bytes, full_cache_bytes
from foveate.portable.linear import LigerAttention
from foveate.tasks.base import Bench, read
from foveate.tasks.perplexity import Perplexity


@method("liger")
class Liger(Converter):
    """Attention becomes a gated linear recurrence without a new parameter; its state has a constant size.

    The forget gates are a function of the keys that the pretrained projection gives, sigmoid(k) ^ (1 / 16), one for
    each channel as in the authors' released code (there, pooling leaves a key's channels as they are); features are
    softmax(q) and softmax(k). Liger Attention is half of that and half softmax over a sliding window (section on
    intra-layer hybrids). Nothing is trained here: the paper recovers the model by LoRA, which is healing.

    Fields:
        window: tokens that the softmax half sees; 0: the recurrence alone.
        gated: False: the recurrence forgets nothing (for comparison).
        pool: neighbouring channels of a key that share a gate, their mean; divides the head size.
        layers: which layers: `all`, `even`, `odd`, or numbers and ranges joined by a slash, such as `0-9/12`.

    Example:
        >>> import foveate as fv, torch
        >>> from foveate.models.caches import cache_bytes, full_cache_bytes
        >>> model, text = fv.tiny("llama"), torch.arange(1, 201).unsqueeze(0)
        >>> with fv.apply(model, "liger:window=16"):
        ...     short, long = (model(text[:, :n], use_cache=True).past_key_values for n in (50, 200))
        >>> cache_bytes(short) == cache_bytes(long)
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "Liger: Linearizing Large Language Models to Gated Recurrent Structures",
        2025,
        "https://arxiv.org/abs/2503.01496",
    )
    claim: ClassVar[str] = "gates made of the pretrained keys make a better recurrence, with no new parameters"

    window: int = 64
    gated: bool = True
    pool: int = 1
    layers: str = "all"

    def __post_init__(self) -> None:
        if self.window < 0 or self.pool < 1:
            raise FoveateError(f"{self}: window must be 0 or more, and pool 1 or more.")

    def converted(self, target: Target) -> dict[str, nn.Module]:
        parts = anatomy(target.model)
        if parts.head_dim % self.pool:
            raise FoveateError(f"{self}: pool does not divide the head size, {parts.head_dim}: give one that does.")
        settings = {"window": self.window, "pool": self.pool, "gated": self.gated}
        return {
            path_of(layer, parts): stand_in(LigerAttention, layer, parts, **settings)
            for layer in layers_to_convert(target, self.layers, self.name)
        }


@claim("liger")
class KeysMakeGates(Claim):
    statement: ClassVar[str] = (
        "gates made of the pretrained keys make the recurrence better with no new parameters, and softmax over a "
        "sliding window in the same layer recovers far more (abstract)"
    )
    setting: ClassVar[str] = (
        "all layers, window 64, straight after the conversion, and after LoRA of rank 8 with distillation on "
        f"{ON_CPU:,} tokens of calibration text (on a GPU {ON_GPU:,}); 1,024 tokens of evaluation text; bytes of the "
        "state after 256 and 1,024 tokens"
    )

    def run(self, bench: Bench) -> Finding:
        task = Perplexity(tokens=1024, chunk=64)
        streams = Streams(bench, task, of=9)
        full, window = streams.read("full"), streams.read("window:entries=64")
        hybrid, ungated = streams.read("liger"), streams.read("liger:gated=false")
        alone, alone_ungated = streams.read("liger:window=0"), streams.read("liger:window=0,gated=false")
        way = "lora:rank=8,alpha=16,lr=1e-3"
        recipes = {"hybrid": "liger", "ungated": "liger:gated=false", "alone": "liger:window=0"}
        healed = {n: streams.read("full", on=recovered(bench, recipe, way)) for n, recipe in recipes.items()}
        before = sum(p.numel() for p in bench.model.parameters())
        with apply(bench.model, "liger"):
            after = sum(p.numel() for p in bench.model.parameters())
            ids = tokens(bench.text.evaluation, bench.tokenizer, 1024).to(bench.model.device)
            short, long = (cache_bytes(read(bench.model, ids[:, :n], last=1)[1]) for n in (256, 1024))
        return Finding(
            {
                "perplexity, softmax attention": full.perplexity,
                "over softmax: Liger Attention": hybrid.over(full),
                "over softmax: Liger Attention, no gates": ungated.over(full),
                "over softmax: the recurrence alone": alone.over(full),
                "over softmax: the recurrence alone, no gates": alone_ungated.over(full),
                "over softmax: the window alone": window.over(full),
                "over softmax, after LoRA: Liger Attention": healed["hybrid"].over(full),
                "over softmax, after LoRA: Liger Attention, no gates": healed["ungated"].over(full),
                "over softmax, after LoRA: the recurrence alone": healed["alone"].over(full),
                "new parameters": Metric.exact(after - before),
                "bytes of the state": Metric.exact(long),
                "state over the full cache of 1,024 tokens": Metric.exact(long / full_cache_bytes(bench.model, 1024)),
            },
            {
                "after LoRA: better with gates than without": healed["hybrid"].below(healed["ungated"]),
                "after LoRA: better with the window than without": healed["hybrid"].below(healed["alone"]),
                "after LoRA: better than the window alone, which needs no training": healed["hybrid"].below(window),
                "the recurrence alone: better with gates than without": alone.below(alone_ungated),
                "no new parameters": after == before,
                "the state is as large after 256 tokens as after 1,024": short == long,
            },
        )
