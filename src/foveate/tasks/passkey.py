"""Passkey: is a number that the text mentioned once still found at the end?"""

from __future__ import annotations

import random
from typing import Any, ClassVar

import torch

from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import mean
from foveate.tasks.base import STEP, Bench, Outcome, Task, cache_metrics, decode, passages, read, task

SENTENCE = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
QUESTION = "\n\nWhat was the pass key? Remember it: the pass key is"
SPARE = 3  # tokens of the answer beyond the digits: a space before them, a full stop after
ROOM = 32  # tokens that question and answer take at most, with a tokenizer of words or pieces of words


@task("passkey")
class Passkey(Task):
    """A number stands somewhere in a long text; only after the text has been read is it asked for.

    The question is not part of the prefill, so a policy evicts without knowing what will be wanted. Each case
    has its own number and passage; the numbers stand at depths spread evenly from the start to the end.

    Fields:
        cases: how many numbers are asked for, each in a text of its own.
        tokens: length of the text, the sentence with the number included, in tokens.
        digits: length of the number.
        seed: which numbers.
        chunk: tokens a forward while the text goes in; None: all in one. In chunks, a budget `keep` is a
            fraction of `longest`, since the prompt is not known when the first chunk is evicted.

    Metrics: `passkey`, the fraction of cases whose greedy answer starts with the number; `cache_bytes`,
    `cache_fraction` after the answer. Artifacts: `cases`, each with its `depth` from 0 (start) to 1 (end).
    """

    title: ClassVar[str] = "finding a pass key"

    cases: int = 8
    tokens: int = 1024
    digits: int = 5
    seed: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.cases < 1 or self.tokens < 128 or not 1 <= self.digits <= 16:
            raise FoveateError(f"{self}: cases must be at least 1, tokens at least 128, and digits 1 to 16.")
        if self.chunk is not None and self.chunk < 2:
            raise FoveateError(f"{self}: chunk must be at least 2, or none for the text in one piece.")

    @property
    def context(self) -> int | None:
        return self.longest if self.chunk else None

    @property
    def longest(self) -> int:
        return self.tokens + ROOM

    def cost(self) -> float:
        return self.cases * (self.tokens + (self.digits + SPARE) * STEP)

    def check(self, bench: Bench) -> None:
        super().check(bench)
        tokens(bench.text.evaluation, bench.tokenizer, self.tokens)

    def run(self, bench: Bench) -> Outcome:
        model, tokenizer = bench.model, bench.tokenizer
        question = tokens(QUESTION, tokenizer).to(model.device)
        rng = random.Random(self.seed)
        cases: list[dict[str, Any]] = []
        for i, passage in enumerate(passages(bench, self.cases, self.tokens)):
            key = str(rng.randrange(10 ** (self.digits - 1), 10**self.digits))
            sentence = tokens(SENTENCE.format(key=key), tokenizer).to(model.device)
            depth = (i + 0.5) / self.cases
            prose = passage[:, : self.tokens - sentence.shape[1]]
            at = round(depth * prose.shape[1])
            text = torch.cat([prose[:, :at], sentence, prose[:, at:]], dim=1)
            cache = None
            for piece in text.split(self.chunk or self.tokens, dim=1):
                _, cache = read(model, piece, cache, last=1)
            ids, cache = decode(model, question, cache, self.digits + SPARE)
            answer = tokenizer.batch_decode(ids)[0]
            cases.append(
                {
                    "prompt": f"...{SENTENCE.format(key=key)}...{QUESTION}",
                    "expected": key,
                    "answer": answer,
                    "ok": answer.strip().startswith(key),
                    "depth": depth,
                }
            )
            bench.progress((i + 1) / self.cases)
        seen = self.tokens + question.shape[1] + ids.shape[1] - 1
        found = mean([float(case["ok"]) for case in cases])
        return Outcome({"passkey": found} | cache_metrics(model, cache, seen), {"cases": cases})
