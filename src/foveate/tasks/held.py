"""Held: which tokens of a passage the cache still holds when it has been read."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.models.anatomy import anatomy
from foveate.tasks.base import Bench, Outcome, Task, read, task


@task("held")
class Held(Task):
    """A passage is read in one forward; a budget `keep` is a fraction of it.

    Fields:
        tokens: length of the passage, in tokens.

    Metrics: `held_fraction`, the entries held over those that the model makes of the passage (layers x KV
    heads x tokens). Artifacts: `held`, for each token by how many of the `of` pairs of a layer and a KV head.
    """

    title: ClassVar[str] = "tokens still held"

    tokens: int = 256

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise FoveateError(f"{self}: tokens must be at least 2.")

    @property
    def context(self) -> int:
        return self.tokens

    @property
    def longest(self) -> int:
        return self.tokens

    def cost(self) -> float:
        return self.tokens

    def check(self, bench: Bench) -> None:
        super().check(bench)
        tokens(bench.text.evaluation, bench.tokenizer, self.tokens)

    def run(self, bench: Bench) -> Outcome:
        ids = tokens(bench.text.evaluation, bench.tokenizer, self.tokens)
        _, cache = read(bench.model, ids.to(bench.model.device), last=1)
        heads = torch.zeros(self.tokens, dtype=torch.int64)
        for positions in held_positions(cache):
            heads += torch.bincount(positions[positions >= 0].cpu(), minlength=self.tokens)
        parts = anatomy(bench.model)
        of = len(parts.layers) * parts.kv_heads
        fraction = heads.sum().item() / (of * self.tokens)
        held = {"tokens": _strings(ids[0].tolist(), bench.tokenizer), "heads": heads.tolist(), "of": of}
        return Outcome({"held_fraction": Metric.exact(fraction)}, {"held": held})


def held_positions(cache: Cache) -> list[Tensor]:
    """The positions in the text of the entries that a cache holds: int (batch, kv_head, entry), by layer.

    An empty slot is -1; a layer that holds nothing (its attention is dropped or skipped) has no entries.

    Example:
        >>> import foveate as fv, torch
        >>> out = fv.tiny("llama")(torch.tensor([[5, 6, 7]]), use_cache=True)
        >>> held_positions(out.past_key_values)[0].tolist()
        [[[0, 1, 2], [0, 1, 2]]]
    """
    held = []
    layers: list[Any] = cache.layers
    for layer in layers:
        if not layer.is_initialized:
            positions = torch.empty(1, 1, 0, dtype=torch.int64)
        elif hasattr(layer, "positions"):
            positions = layer.positions
        else:  # transformers' own layers hold the most recent tokens, without a gap
            seen, entries = layer.get_seq_length(), layer.keys.shape[-2]
            positions = torch.arange(seen - entries, seen).expand(*layer.keys.shape[:2], -1)
        held.append(positions)
    return held


def _strings(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each token as a piece of text that can be read alone."""
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    texts = tokenizer.batch_decode([[i] for i in ids])
    # SentencePiece's mark of a space before a word is lost where a token is decoded alone.
    return [
        f" {text}" if piece.startswith("▁") and text[:1] != " " else text
        for piece, text in zip(pieces, texts, strict=True)
    ]
