"""Blockwise: weights in a few bits each, with a scale of their own for every block of neighbours."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foveate.claims import Claim, Finding, Streams, claim
from foveate.convert.base import Converter
from foveate.convert.maps import like, weight_of
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.measure.weights import weight_bytes
from foveate.methods import Paper, Target, apply, method
from foveate.models.anatomy import anatomy
from foveate.models.family import families
from foveate.portable.blockwise import BlockwiseEmbedding, BlockwiseHead, BlockwiseLinear, BlockwiseTable, pack
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("blockwise")
class Blockwise(Converter):
    """Round weights to `bits` bits, block by block: the linear maps of all layers, the embedding and the head.

    A block is a run of `block` weights that belong to one output. Its weights are low + code * step, codes from 0 to
    2**bits - 1, evenly spread from the block's least weight to its greatest; low and step are float16, so they add 32
    bits to a block. With `shift=true`, as in the paper, a step is a power of two, which hardware multiplies with by
    shifting, codes lie around zero, and a block has 8 bits of parameters. No text is needed and nothing is trained.

    Codes are packed into bytes and made whole again in each forward, so what shrinks is storage and memory, not
    arithmetic: without kernels for it, a quantised model is slower. Only weights are quantised; the paper also puts
    GELU, softmax, layer norm and what lies between them into integers, and that is not here. Norms, biases and learned
    positions stay. It works on maps that another converter made too (`low-rank:keep=0.8+blockwise:bits=8`).

    Fields:
        bits: of a code, 2 to 8.
        block: weights in a block, a multiple of 8; None: one block for each matrix, which is layerwise quantisation.
        shift: whether steps are powers of two.
        embedding: whether the embedding and the head are quantised; where they are tied, they go on sharing a table.

    Example:
        >>> import foveate as fv
        >>> from foveate.measure.weights import weight_bytes
        >>> model = fv.tiny("llama")
        >>> whole = weight_bytes(model)
        >>> with fv.apply(model, "blockwise:bits=4,block=32"):  # 4 bits, and 32 / 32 of a block's parameters
        ...     round(whole / weight_bytes(model), 1)
        6.3
    """

    paper: ClassVar[Paper | None] = Paper(
        "Blockwise Compression of Transformer-based Models without Retraining", 2023, "https://arxiv.org/abs/2304.01483"
    )
    claim: ClassVar[str] = "quantised in small blocks, weights need no retraining, where whole layers would"

    bits: int = 4
    block: int | None = 64
    shift: bool = False
    embedding: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FoveateError(f"blockwise: bits={self.bits} is outside 2 to 8: give a number such as 4.")
        if self.block is not None and (self.block < 8 or self.block % 8):
            raise FoveateError(
                f"blockwise: block={self.block} is no multiple of 8: give a number such as 64, or none for one block a "
                "matrix."
            )

    def converted(self, target: Target) -> dict[str, nn.Module]:
        parts = anatomy(target.model)
        layers = families()[parts.family].layers
        paths: dict[Any, str] = {module: path for path, module in parts.model.named_modules()}
        for module, path in paths.items():
            if isinstance(module, BlockwiseTable):
                raise FoveateError(f"{self}: {path} is quantised already: name blockwise once in a recipe.")
        new: dict[str, nn.Module] = {
            path: self._linear(module)
            for module, path in paths.items()
            if path.startswith(f"{layers}.") and isinstance(module, nn.Linear | Conv1D)
        }
        if self.embedding:
            embedding, head = paths[parts.embedding], paths[parts.head]
            new[embedding] = self._embedding(parts.embedding)
            tied = getattr(parts.head, "weight", None) is parts.embedding.weight
            new[head] = BlockwiseHead(embedding) if tied else self._linear(parts.head)
        return new

    def _linear(self, old: Any) -> BlockwiseLinear:
        weight = weight_of(old)
        rows, columns = weight.shape
        new: BlockwiseLinear = like(
            BlockwiseLinear(columns, rows, self.bits, self.block, self.shift, old.bias is not None), old
        )
        fill(new, weight)
        if new.bias is not None:
            with torch.no_grad():
                new.bias.copy_(old.bias)
        return new

    def _embedding(self, old: Any) -> BlockwiseEmbedding:
        scale = float(getattr(old, "scalar_embed_scale", 1.0))  # Gemma 3
        rows, columns = old.weight.shape
        new: BlockwiseEmbedding = like(BlockwiseEmbedding(rows, columns, self.bits, self.block, self.shift, scale), old)
        fill(new, old.weight.detach())
        return new


def fill(table: BlockwiseTable, weight: Tensor) -> None:
    """Round a weight (rows, columns) to a table's codes.

    The parameters of a block are rounded first, to what is stored of them, and codes are chosen for these.
    """
    bits, exact = table.bits, weight.float()
    block = table.block or 8
    short = -exact.shape[1] % block
    if short:  # the last block of a row is padded with what does not widen its range
        exact = torch.cat([exact, exact[:, -1:].expand(-1, short)], dim=1)
    blocks = exact.reshape(1, 1, -1) if table.block is None else exact.unflatten(1, (-1, block))
    most = 2**bits - 1
    if table.shift:
        half = 2 ** (bits - 1)
        # The smallest power of two that reaches the block's largest weight.
        largest = blocks.abs().amax(dim=-1).clamp(min=2.0**-100)
        exponent = (largest / (half - 1)).log2().ceil().clamp(-126, 127)
        steps, lows = exponent.exp2(), -half * exponent.exp2()
        table.step.copy_(exponent)
    else:
        low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
        kept_low = low.half()
        kept_step = ((high - kept_low.float()) / most).half()
        steps, lows = kept_step.float(), kept_low.float()
        if not (steps.isfinite().all() and lows.isfinite().all()):
            raise FoveateError("blockwise: weights beyond 65,504 don't fit a block's float16 parameters.")
        table.step.copy_(kept_step.view(torch.int16))
        assert table.low is not None
        table.low.copy_(kept_low.view(torch.int16))
    safe = steps.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = ((blocks - lows[..., None]) / safe).round().clamp(0, most).to(torch.uint8)
    table.packed.copy_(pack(codes.view(exact.shape), bits))


@claim("blockwise")
class SmallBlocksLoseLess(Claim):
    statement: ClassVar[str] = (
        "quantised in small blocks a transformer needs no retraining: less is lost than layer by layer, at up to 7.988 "
        "times fewer bytes (abstract; there activations too, here weights only)"
    )
    setting: ClassVar[str] = (
        "linear maps, embedding and head; 8 and 4 bits, blocks of 64 against one block a matrix; steps of powers of "
        "two; 2,048 tokens of evaluation text; bytes with the blocks' parameters, against float32"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, chunk=256), of=6)
        full = streams.read("full")
        whole = weight_bytes(bench.model)
        metrics, checks = {"perplexity, whole model": full.perplexity}, {}
        for bits in (8, 4):
            read, error, smaller = {}, {}, {}
            for words, block in (("blocks", "64"), ("layers", "none")):
                recipe = f"blockwise:bits={bits},block={block}"
                read[words] = streams.read(recipe)
                with apply(bench.model, recipe, tokenizer=bench.tokenizer):
                    smaller[words] = whole / weight_bytes(bench.model)
                    rounded = _layer_weights(bench)
                error[words] = _distance(_layer_weights(bench), rounded)
                metrics[f"over whole, {bits} bits: {words}"] = read[words].over(full)
                metrics[f"relative error of the weights, {bits} bits: {words}"] = Metric.exact(error[words])
                metrics[f"times smaller, {bits} bits: {words}"] = Metric.exact(smaller[words])
            checks[f"{bits} bits: weights closer in blocks"] = error["blocks"] < error["layers"]
            checks[f"{bits} bits: perplexity lower in blocks"] = read["blocks"].below(read["layers"])
        shift = streams.read("blockwise:bits=8,shift=true")
        metrics["over whole, 8 bits: blocks, powers of two"] = shift.over(full)
        checks["8 bits in blocks lose less than 1%"] = metrics["over whole, 8 bits: blocks"].value < 1.01
        checks["4 bits are at least 6 times smaller"] = metrics["times smaller, 4 bits: blocks"].value > 6
        return Finding(metrics, checks)


def _layer_weights(bench: Bench) -> list[Tensor]:
    """The weights of the layers' maps (out, in), quantised or not."""
    maps = [getattr(layer, role) for layer in anatomy(bench.model).layers for role in layer.names]
    return [
        each.numbers(torch.float32) if isinstance(each, BlockwiseTable) else weight_of(each).float()
        for each in maps
        if isinstance(each, nn.Linear | Conv1D | BlockwiseTable)
    ]


def _distance(exact: list[Tensor], rounded: list[Tensor]) -> float:
    """The relative error over all matrices (Frobenius)."""
    lost = sum(float((a - b).square().sum()) for a, b in zip(exact, rounded, strict=True))
    return float((lost / sum(float(a.square().sum()) for a in exact)) ** 0.5)
