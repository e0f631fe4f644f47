"""Perplexity of a text that streams through in chunks, while the policy in force evicts."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import perplexity
from foveate.models.anatomy import anatomy
from foveate.tasks.base import Bench, Outcome, Task, cache_metrics, read, surprisal, task


@task("perplexity")
class Perplexity(Task):
    """Chunks of `chunk` tokens go in one after the other, each onto the cache that the one before left.

    A budget `keep` is a fraction of `window`. `tokens` may go far beyond the window, and beyond the model's positions
    where these are rotary: there the full cache breaks down, and a policy that assigns positions inside the cache
    need not.

    Fields:
        tokens: length of the text, in tokens.
        window: the window length that budgets refer to, in tokens.
        chunk: tokens a forward.
        skip: tokens at the start that are read but not scored (all recipes are still the same there).

    Metrics: `perplexity` over the scored tokens, resampled in blocks of a chunk; `cache_bytes`, `cache_fraction` at
    the end. Artifacts: `curve` (perplexity of each chunk), `blocks` (summed nats and tokens of each scored chunk).
    """

    title: ClassVar[str] = "perplexity of streamed text"

    tokens: int = 4096
    window: int = 2048
    chunk: int = 128
    skip: int = 0

    def __post_init__(self) -> None:
        if min(self.tokens, self.window, self.chunk) < 2 or not 0 <= self.skip < self.tokens - 1:
            raise FoveateError(
                f"{self}: tokens, window and chunk must be 2 or more, and skip at least 0 and less than tokens - 1."
            )

    @property
    def context(self) -> int:
        return self.window

    @property
    def longest(self) -> int:
        return self.window

    def cost(self) -> float:
        return self.tokens

    def check(self, bench: Bench) -> None:
        super().check(bench)
        parts = anatomy(bench.model)
        if parts.positions == "learned" and self.tokens > parts.max_positions:
            raise FoveateError(
                f"{self}: this model has a table of {parts.max_positions} learned positions and can't read "
                f"{self.tokens} tokens in one stream: ask for tokens={parts.max_positions} at most."
            )
        tokens(bench.text.evaluation, bench.tokenizer, self.tokens)

    def run(self, bench: Bench) -> Outcome:
        ids = tokens(bench.text.evaluation, bench.tokenizer, self.tokens).to(bench.model.device)
        cache, last = None, None
        nll: list[float] = []
        counts: list[int] = []
        ends: list[int] = []
        for start in range(0, self.tokens, self.chunk):
            piece = ids[:, start : start + self.chunk]
            logits, cache = read(bench.model, piece, cache)
            # The first token of a chunk is predicted by the last logits of the chunk before.
            predicted = logits[:, :-1] if last is None else torch.cat([last, logits[:, :-1]], dim=1)
            targets = piece[:, 1:] if last is None else piece
            last = logits[:, -1:]
            losses = surprisal(predicted, targets)[0].double()
            position = start + (piece.shape[1] - targets.shape[1])
            scored = losses[max(0, self.skip - position) :]
            if len(scored):
                nll.append(float(scored.sum()))
                counts.append(len(scored))
                ends.append(start + piece.shape[1])
            bench.progress((start + piece.shape[1]) / self.tokens)
        curve = [math.exp(min(total / count, 700)) for total, count in zip(nll, counts, strict=True)]
        metrics = {"perplexity": perplexity(nll, counts)} | cache_metrics(bench.model, cache, self.tokens)
        return Outcome(
            metrics,
            {
                "curve": {"x": ends, "y": curve, "x_name": "tokens read", "y_name": "perplexity"},
                "blocks": {"nll": nll, "tokens": counts},
            },
        )
