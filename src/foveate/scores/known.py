"""The scores of a target's heads on calibration text: measured once a model, then read from disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from foveate.data.needles import WORDINGS, needles
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.shown import Shown
from foveate.methods import Target, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.stored import stored, text_digest
from foveate.scores.gates import gate_scores
from foveate.scores.retrieval import retrieval_hits

CASES = 12
LENGTH = 1024
TOKENS = 16384


@dataclass(frozen=True)
class Retrieved:
    """What was measured on needles.

    Attributes:
        hits: (cases, layers, heads): at how many tokens of the answer a head looked most at what comes next.
        answers: (cases,): tokens of the answer.
        length: tokens of the text that a needle lies in.
    """

    hits: Tensor
    answers: Tensor
    length: int

    def scores(self, cases: slice = slice(None)) -> UnitScores:
        """Retrieval scores of the query heads, over all cases or some: (layers, heads)."""
        return UnitScores("head", self.hits[cases].sum(0) / self.answers[cases].sum())


def retrieved(target: Target, progress: Callable[[float], None] | None = None) -> Retrieved:
    """What each head of a target retrieves, case by case: what the budget `retrieval` and the probe share.

    Args:
        target: the model, its tokenizer and calibration text.
        progress: called with the fraction done where it is measured now; None: a bar in the terminal.
    """
    ids = target.calibration(TOKENS)
    length = needle_length(target, ids)

    def measure() -> dict[str, Tensor]:
        cases = needles(ids, target.tokenizer(), cases=CASES, length=length)
        answers = cases[0].answer.new_tensor([case.answer.shape[1] for case in cases])
        if progress is not None:
            return {"hits": retrieval_hits(target.model, cases, progress), "answers": answers}
        with Shown("retrieval scores of the heads") as shown:
            return {"hits": retrieval_hits(target.model, cases, shown), "answers": answers}

    kept = stored(target.model, "retrieval", f"heads 2 {_version(ids, length)}", measure)
    return Retrieved(kept["hits"], kept["answers"], length)


def retrieval_heads_of(target: Target, progress: Callable[[float], None] | None = None) -> UnitScores:
    """Retrieval scores of the query heads: (layers, heads)."""
    return retrieved(target, progress).scores()


def retrieval_of(target: Target) -> UnitScores:
    """Retrieval scores of the KV heads, each the best of its query heads: (layers, kv_heads)."""
    parts = anatomy(target.model)
    heads = retrieval_heads_of(target).scores
    return UnitScores("kv_head", heads.view(len(parts.layers), parts.kv_heads, -1).amax(-1))


def gates_of(target: Target) -> UnitScores:
    """Gate scores of the KV heads: (layers, kv_heads)."""
    ids = target.calibration(TOKENS)
    length = needle_length(target, ids)

    def measure() -> dict[str, Tensor]:
        cases = needles(ids, target.tokenizer(), cases=CASES, length=length)
        room = ids.shape[1] - length
        texts = [ids[:, start : start + length] for start in range(0, room + 1, max(1, room // 4))][:4]
        with Shown("gate scores of the KV heads") as progress:
            return {"scores": gate_scores(target.model, cases, texts, progress=progress).scores}

    return UnitScores("kv_head", stored(target.model, "gates", _version(ids, length), measure)["scores"])


def needle_length(target: Target, ids: Tensor) -> int:
    """Tokens of a text with a needle: the question and the answer have to find positions after it.

    Raises:
        FoveateError: the model has too few positions for that.
    """
    tokenizer, positions = target.tokenizer(), anatomy(target.model).max_positions
    after = max(tokens(f"\n\n{question} 00000", tokenizer).shape[1] for _, question in WORDINGS)
    needle = max(tokens(f"\n\n{sentence.format(key='00000')}\n\n", tokenizer).shape[1] for sentence, _ in WORDINGS)
    if positions < needle + after + 16:
        raise FoveateError(
            f"needles in text take {needle + after + 16} tokens with this tokenizer, and the model has {positions} "
            "positions: take a model with more."
        )
    return min(LENGTH, ids.shape[1] // 2, positions - after)


def _version(ids: Tensor, length: int) -> str:
    return f"1 {CASES} {length} {text_digest(ids)}"
