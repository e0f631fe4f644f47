"""Generate: samples to read."""

from __future__ import annotations

from typing import ClassVar

import torch

from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.tasks.base import STEP, Bench, Outcome, Task, passages, task


@task("generate")
class Generate(Task):
    """Passages of the text, carried on greedily by `model.generate`: a look at what a recipe does to them.

    Fields:
        samples: how many passages.
        prompt: length of a passage, in tokens.
        tokens: tokens generated at most; fewer where the model ends its text.

    Metrics: `tokens` generated in all; `distinct_2`, the fraction of a sample's bigrams of tokens that differ
    (text that goes in circles has few). Artifacts: `samples`.
    """

    title: ClassVar[str] = "samples to read"

    samples: int = 3
    prompt: int = 512
    tokens: int = 48

    def __post_init__(self) -> None:
        if self.samples < 1 or self.prompt < 2 or self.tokens < 1:
            raise FoveateError(f"{self}: samples and tokens must be at least 1, and prompt at least 2.")

    @property
    def longest(self) -> int:
        return self.prompt + self.tokens

    def cost(self) -> float:
        return self.samples * (self.prompt + self.tokens * STEP)

    def check(self, bench: Bench) -> None:
        super().check(bench)
        tokens(bench.text.evaluation, bench.tokenizer, self.prompt)

    def run(self, bench: Bench) -> Outcome:
        tokenizer = bench.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # A model may bring settings for sampling, which greedy search would warn of.
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        samples, distinct, total = [], [], 0
        for i, prompt in enumerate(passages(bench, self.samples, self.prompt)):
            ids = bench.model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.tokens,
                pad_token_id=pad,
                **greedy,
            )
            new = ids[0, prompt.shape[1] :].tolist()
            pairs = list(zip(new, new[1:], strict=False))
            distinct.append(len(set(pairs)) / len(pairs) if pairs else 1.0)
            total += len(new)
            text = tokenizer.decode(new, skip_special_tokens=True)
            samples.append({"prompt": tokenizer.decode(prompt[0]), "text": text})
            bench.progress((i + 1) / self.samples)
        return Outcome({"tokens": Metric.exact(total), "distinct_2": mean(distinct)}, {"samples": samples})
