"""Recursive: a few layers run in a loop, each time with small corrections that make them what they were."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.claims import Claim, Finding, Streams, claim
from foveate.convert.base import Converter
from foveate.convert.maps import LinearMap, like, linear_maps
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.heal.trial import ON_CPU, ON_GPU, recovered
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper, Target, apply, method
from foveate.models.anatomy import anatomy
from foveate.models.surgery import layer_parameters
from foveate.portable.recursive import LoopedLinear
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

INITS = ("average", "stepwise", "lower")


@method("recursive")
class Recursive(Converter):
    """Tie the linear maps of layers that are `layers / loops` apart, and give each depth a low-rank correction (LoRA).

    A model of L layers becomes a block of K = L / loops unique layers that runs `loops` times: layer l has the tied
    maps of place l mod K (the paper's CYCLE). The correction of each depth begins as the truncated SVD of what the
    layer had minus the tied map (section 2.4), so at full rank the model computes what it did; at rank 0 it is the
    Recursive Transformer without relaxation. Norms and biases stay each depth's own, as does the cache: they cost next
    to nothing, and depths differ in them. That the paper ties norms or not we could not find; keeping them is ours.

    The tied maps are saved once, at the first depth. The paper trains the model after conversion ("uptraining");
    without that or another healing, small ranks are far from the original. Its batching over depths and early exits
    are not here.

    Fields:
        rank: of the corrections; 0: none. Each costs rank * (in + out) parameters, so to save, stay well below half of
            in * out / (in + out).
        loops: how many times the block runs; it divides the number of layers.
        init: where tied maps come from (section 2.2, 2.3): "average" of the maps that are tied, best with corrections;
            "stepwise", K layers at even steps, first and last among them, best without; "lower", the first K layers.
        lora: how corrections begin: "svd", or "zero" (nothing is added until they are trained).

    Example:
        >>> import foveate as fv, torch
        >>> model, ids = fv.tiny("llama"), torch.arange(1, 65).unsqueeze(0)
        >>> logits = model(ids).logits
        >>> with fv.apply(model, "recursive:rank=64"):  # full rank
        ...     torch.allclose(model(ids).logits, logits, atol=1e-4)
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA",
        2024,
        "https://arxiv.org/abs/2410.20672",
    )
    claim: ClassVar[str] = "layers can be tied, and SVD-initialised LoRA brings back what each of them was"

    rank: int
    loops: int = 2
    init: str = "average"
    lora: str = "svd"

    def __post_init__(self) -> None:
        if self.rank < 0 or self.loops < 2:
            raise FoveateError(f"{self}: rank must be 0 or more, and loops 2 or more.")
        if self.init not in INITS or self.lora not in ("svd", "zero"):
            raise FoveateError(f"{self}: init is one of {', '.join(INITS)}, and lora is svd or zero.")

    def converted(self, target: Target) -> dict[str, nn.Module]:
        parts = anatomy(target.model)
        layers = len(parts.layers)
        if layers % self.loops:
            raise FoveateError(
                f"{self}: {layers} layers can't be looped {self.loops} times: give a number of loops that divides "
                f"{layers}."
            )
        unique = layers // self.loops
        maps = {(each.layer, each.role): each for each in linear_maps(parts, "all", self.name)}
        new: dict[str, nn.Module] = {}
        for role in dict.fromkeys(role for _, role in maps):
            for place in range(unique):
                tied = [self._map(maps, place + unique * loop, role) for loop in range(self.loops)]
                shared = self._shared(maps, place, role, layers, tied)
                for each in tied:
                    owner = None if each is tied[0] else tied[0].path
                    new[each.path] = self._looped(each, shared, owner)
        return new

    def _map(self, maps: dict[tuple[int, str], LinearMap], layer: int, role: str) -> LinearMap:
        if (layer, role) not in maps:
            raise FoveateError(f"{self}: layer {layer} has no map {role!r} to tie: convert before parts are removed.")
        return maps[layer, role]

    def _shared(
        self, maps: dict[tuple[int, str], LinearMap], place: int, role: str, layers: int, tied: list[LinearMap]
    ) -> Tensor:
        """The tied weight, float64 (out, in)."""
        chosen = {
            "average": tied,
            "stepwise": [self._map(maps, step_layers(layers, layers // self.loops)[place], role)],
            "lower": tied[:1],
        }[self.init]
        shapes = {tuple(each.weight.shape) for each in [*tied, *chosen]}
        if len(shapes) > 1:
            raise FoveateError(
                f"{self}: {', '.join(each.path for each in tied)} differ in shape and can't be tied: prune with "
                "budget=uniform, or convert first."
            )
        return torch.stack([each.weight.double() for each in chosen]).mean(dim=0)

    def _looped(self, each: LinearMap, shared: Tensor, owner: str | None) -> LoopedLinear:
        rows, columns = shared.shape
        rank, bias = min(self.rank, rows, columns), each.module.bias
        new: LoopedLinear = like(LoopedLinear(columns, rows, rank, bias is not None, owner), each.module)
        with torch.no_grad():
            if owner is None:
                new.base.weight.copy_(shared)
            if rank and self.lora == "svd":
                # The rest is taken from the tied weight as it is stored, in the model's dtype.
                left, values, right = torch.linalg.svd(
                    each.weight.double() - shared.to(each.weight.dtype).double(), full_matrices=False
                )
                new.up.weight.copy_(left[:, :rank] * values[:rank])
                new.down.weight.copy_(right[:rank])
            elif rank:
                nn.init.zeros_(new.up.weight)
            if bias is not None and new.bias is not None:
                new.bias.copy_(bias)
        return new


def step_layers(layers: int, unique: int) -> list[int]:
    """`unique` layers at even steps, the first and the last among them.

    Example:
        >>> step_layers(18, 6)
        [0, 3, 7, 10, 14, 17]
    """
    return [round(place * (layers - 1) / max(1, unique - 1)) for place in range(unique)]


@claim("recursive")
class SvdBringsBack(Claim):
    statement: ClassVar[str] = (
        "layers tied in a loop, relaxed by LoRA of each depth, recover most of the original (abstract, after "
        "uptraining); LoRA from the SVD of what tying lost begins closer to it than LoRA from zero (section 2.4)"
    )
    setting: ClassVar[str] = (
        "2 loops of 15 layers, tied maps averaged; ranks 0, 64 and 192, and full rank, nothing trained; rank 64 after "
        f"distillation on {ON_CPU:,} tokens of calibration text (on a GPU {ON_GPU:,}); 1,024 tokens of evaluation "
        "text, logits of 128"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=1024, chunk=128), of=8)
        whole = layer_parameters(bench.model)
        full = streams.read("full")
        zero = streams.read("recursive:rank=64,lora=zero")  # the same at any rank, as nothing is added
        stepwise = streams.read("recursive:rank=0,init=stepwise")
        svd = {rank: streams.read(f"recursive:rank={rank}") for rank in (64, 192)}
        way = "distill:hidden=0,lr=3e-4"
        students = {lora: recovered(bench, f"recursive:rank=64,lora={lora}", way) for lora in ("svd", "zero")}
        trained = {lora: streams.read("full", on=student) for lora, student in students.items()}
        sizes = {}
        for rank in (0, 64, 192):
            with apply(bench.model, f"recursive:rank={rank},lora=zero", tokenizer=bench.tokenizer):
                sizes[rank] = layer_parameters(bench.model) / whole
        ids = tokens(bench.text.evaluation, bench.tokenizer, 128).to(bench.model.device)
        with torch.no_grad():
            before = bench.model(ids).logits
            with apply(bench.model, f"recursive:rank={anatomy(bench.model).hidden}", tokenizer=bench.tokenizer):
                apart = float((bench.model(ids).logits - before).abs().max())
        return Finding(
            {
                "perplexity, whole model": full.perplexity,
                "over whole: tied, averaged, LoRA from zero": zero.over(full),
                "over whole: tied, stepwise, no LoRA": stepwise.over(full),
                **{f"over whole: SVD, rank {rank}": each.over(full) for rank, each in svd.items()},
                **{f"over whole: {lora}, rank 64, distilled": each.over(full) for lora, each in trained.items()},
                **{f"parameters of the layers, rank {rank}": Metric.exact(size) for rank, size in sizes.items()},
                "largest difference of logits at full rank": Metric.exact(apart),
            },
            {
                "at full rank the logits are the original's (1e-4 in float32)": apart < 1e-4,
                "LoRA from the SVD below LoRA from zero, rank 64": svd[64].below(zero),
                "LoRA from the SVD below LoRA from zero, rank 192": svd[192].below(zero),
                "after distillation, LoRA from the SVD below LoRA from zero": trained["svd"].below(trained["zero"]),
                "fewer parameters at rank 64": sizes[64] < 1,
            },
        )
