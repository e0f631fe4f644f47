"""Speed: how fast a recipe reads and writes, against the full model in alternation."""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, median
from foveate.measure.clock import alternated, peak_bytes, timed
from foveate.methods import Recipe, apply
from foveate.tasks.base import STEP, Bench, Outcome, Task, cache_metrics, decode, read, task


@task("speed")
class Speed(Task):
    """A prompt is read in one forward (prefill), then tokens are generated one by one (decode); batch of one.

    Every round times the recipe and the full model one after the other; a speedup is the median over rounds
    of full's seconds over the recipe's, so above 1 the recipe is the faster. One round warms up.

    Fields:
        prompt: length of the prompt, in tokens.
        tokens: tokens generated after it.
        repeats: rounds that count.

    Metrics: `prefill_seconds`, `prefill_tokens_per_second`, `decode_tokens_per_second`; `prefill_speedup`,
    `decode_speedup` (exactly 1 for `full` itself); `cache_bytes`, `cache_fraction` at the end; `parameters`
    in force; `peak_memory_bytes`, the bytes of these and the most that prefill and decode had allocated
    beside them at one time.
    """

    title: ClassVar[str] = "speed and memory"

    prompt: int = 1024
    tokens: int = 32
    repeats: int = 5

    def __post_init__(self) -> None:
        if self.prompt < 2 or self.tokens < 1 or self.repeats < 1:
            raise FoveateError(f"{self}: prompt must be at least 2, tokens and repeats at least 1.")

    @property
    def longest(self) -> int:
        return self.prompt + self.tokens + 1

    def cost(self) -> float:
        return (2 * (self.repeats + 1) + 1) * (self.prompt + self.tokens * STEP)

    def check(self, bench: Bench) -> None:
        super().check(bench)
        tokens(bench.text.evaluation, bench.tokenizer, self.prompt)

    def run(self, bench: Bench) -> Outcome:
        """Without speedups: what is in force has nothing to be compared with."""
        return self._measured(bench, None)

    def measure(self, bench: Bench, recipe: Recipe) -> Outcome:
        if all(method.name == "full" for method in recipe.methods):
            outcome = self.run(bench)
            outcome.metrics |= {"prefill_speedup": Metric.exact(1), "decode_speedup": Metric.exact(1)}
            return outcome
        baseline = _with_same_weights(bench.model)
        with apply(bench.model, recipe, context=self.context, tokenizer=bench.tokenizer):
            return self._measured(bench, baseline)

    def _measured(self, bench: Bench, baseline: PreTrainedModel | None) -> Outcome:
        model = bench.model
        ids = tokens(bench.text.evaluation, bench.tokenizer, self.prompt).to(model.device)
        peak, (_, _, cache) = peak_bytes(partial(self._once, model, ids), model.device)
        measured = cache_metrics(model, cache, self.prompt + self.tokens)
        del cache
        models = [model] if baseline is None else [model, baseline]
        sides = [lambda m=m: self._once(m, ids)[:2] for m in models]  # type: ignore[misc]
        rounds, *others = alternated(sides, self.repeats, bench.progress)
        weights = list(model.parameters())
        metrics = {
            "prefill_seconds": median([prefill for prefill, _ in rounds]),
            "prefill_tokens_per_second": median([self.prompt / prefill for prefill, _ in rounds]),
            "decode_tokens_per_second": median([self.tokens / decoding for _, decoding in rounds]),
            "parameters": Metric.exact(sum(w.numel() for w in weights)),
            "peak_memory_bytes": Metric.exact(peak + sum(w.nbytes for w in chain(weights, model.buffers()))),
        }
        for full in others:
            pairs = list(zip(full, rounds, strict=True))
            metrics["prefill_speedup"] = median([a[0] / b[0] for a, b in pairs])
            metrics["decode_speedup"] = median([a[1] / b[1] for a, b in pairs])
        return Outcome(metrics | measured)

    def _once(self, model: PreTrainedModel, ids: Tensor) -> tuple[float, float, Any]:
        """Seconds of prefill, seconds of decode, and the cache after both."""
        prefill, (logits, cache) = timed(lambda: read(model, ids, last=1), model.device)
        first = logits.argmax(-1)
        decoding, (_, cache) = timed(lambda: decode(model, first, cache, self.tokens), model.device)
        return prefill, decoding, cache


def _with_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules on the same tensors: it stays as it is while a recipe is in force on the model.

    So a recipe is applied, and scores its units, once and not again every round.
    """
    return copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})
