"""Copy: how much less a list of nouns surprises when it comes back."""

from __future__ import annotations

import copy
import random
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import mean
from foveate.tasks.base import Bench, Outcome, Task, cache_metrics, passages, read, surprisal, task

FIRST = "\n\nBefore she left, Anna wrote down a list of words:"
SECOND = "\n\nWhen she came back, Anna read the list of words again:"
WORDS = """
    actor anchor apple artist basket beach blanket bottle bread bridge bullet butter cabin camera candle
    castle cheese cloud cotton dentist desert doctor dragon drum eagle earth elbow engine engineer
    farmer feather fence finger flower forest garden ghost glove gold guitar hammer harbor honey horse
    hotel ice ink insect iron island jacket jar jewel judge jungle kettle key king kitchen knife ladder
    lamp lawyer leather lemon lion magnet market milk mirror mountain mouse needle nest novel nurse
    ocean onion orange oven paint palace pencil piano pilot planet pocket queen quilt rabbit rain river
    robot rocket rope saddle sand soldier sugar teacher temple ticket tiger tower tree umbrella uncle
    valley village violin wagon whale wheel window winter yard zebra
"""
NOUNS = WORDS.split()


@task("copy")
class Copy(Task):
    """A list of nouns, a stretch of prose, a list again: the same one, the same in another order, or another.

    The measure is that of Characterizing Verbatim Short-Term Memory in Neural Language Models (2022,
    https://arxiv.org/abs/2210.13569): the mean surprisal of the second list's nouns over that of the first's.
    A model that remembers the words has a low ratio for the permuted list; one that remembers their order
    too, a far lower one for the repeated list. The novel list is the control, near 1. Commas are not scored.
    The second list comes in after the policy has evicted.

    Fields:
        cases: how many lists, each with its own nouns and prose.
        nouns: length of a list.
        gap: tokens of prose between the two.
        seed: which nouns.

    Metrics, means over the cases: `copy_surprisal_ratio` (the repeated list),
    `copy_surprisal_ratio_permuted`, `copy_surprisal_ratio_novel`; `cache_bytes`, `cache_fraction` after the
    repeated list.
    """

    title: ClassVar[str] = "memory of a word list"

    cases: int = 8
    nouns: int = 10
    gap: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        most = len(NOUNS) // 2
        if self.cases < 1 or self.gap < 1 or not 2 <= self.nouns <= most:
            raise FoveateError(f"{self}: cases and gap must be at least 1, and nouns 2 to {most}.")

    @property
    def longest(self) -> int:
        return self.gap + 64 + 8 * self.nouns  # two lists at up to 4 tokens a noun, and what leads up to them

    def cost(self) -> float:
        return self.cases * (self.longest + 3 * (32 + 4 * self.nouns))

    def check(self, bench: Bench) -> None:
        super().check(bench)
        tokens(bench.text.evaluation, bench.tokenizer, self.gap)

    def run(self, bench: Bench) -> Outcome:
        model, tokenizer = bench.model, bench.tokenizer
        rng = random.Random(self.seed)
        ratios: dict[str, list[float]] = {"": [], "_permuted": [], "_novel": []}
        for i, prose in enumerate(passages(bench, self.cases, self.gap)):
            drawn = rng.sample(NOUNS, 2 * self.nouns)
            nouns = drawn[: self.nouns]
            others = {"_novel": drawn[self.nouns :], "_permuted": _permuted(nouns, rng), "": nouns}
            first, cache = _listed(model, tokenizer, FIRST, nouns, None, prose)
            for name, second in others.items():
                again, after = _listed(model, tokenizer, SECOND, second, copy.deepcopy(cache))
                ratios[name].append(again / first)
            bench.progress((i + 1) / self.cases)
        metrics = {f"copy_surprisal_ratio{name}": mean(values) for name, values in ratios.items()}
        return Outcome(metrics | cache_metrics(model, after, after.get_seq_length()))


def _permuted(nouns: list[str], rng: random.Random) -> list[str]:
    """The nouns in an order in which none follows the one it followed."""
    while True:
        order = rng.sample(nouns, len(nouns))
        if not set(zip(order, order[1:], strict=False)) & set(zip(nouns, nouns[1:], strict=False)):
            return order


def written(tokenizer: PreTrainedTokenizerBase, lead: str, nouns: list[str]) -> tuple[Tensor, Tensor]:
    """A lead and a list: token ids, LongTensor (1, n), and which of them are of nouns, bool (n,)."""
    pieces: list[Tensor] = [tokens(lead, tokenizer)]
    scored = [False] * pieces[0].shape[1]
    for i, noun in enumerate(nouns):
        for text, wanted in ((f" {noun}", True), ("." if i == len(nouns) - 1 else ",", False)):
            pieces.append(tokens(text, tokenizer))
            scored += [wanted] * pieces[-1].shape[1]
    return torch.cat(pieces, dim=1), torch.tensor(scored)


def _listed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lead: str,
    nouns: list[str],
    cache: Any,
    after: Tensor | None = None,
) -> tuple[float, Any]:
    """Read a lead, a list and what comes after, in one forward: the nouns' mean surprisal, and the cache."""
    ids, scored = (each.to(model.device) for each in written(tokenizer, lead, nouns))
    logits, cache = read(model, ids if after is None else torch.cat([ids, after], dim=1), cache)
    losses = surprisal(logits[:, : ids.shape[1] - 1], ids[:, 1:])[0]
    return float(losses[scored[1:]].mean()), cache
