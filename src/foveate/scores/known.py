"""The scores of a target's KV heads on calibration text: measured once a model, then read from disk."""

from __future__ import annotations

import hashlib

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from foveate.data.needles import needles
from foveate.methods import Target, UnitScores
from foveate.models.anatomy import anatomy
from foveate.scores.gates import gate_scores
from foveate.scores.retrieval import retrieval_scores
from foveate.scores.stored import stored

CASES = 12
LENGTH = 1024
TOKENS = 16384


def retrieval_of(target: Target) -> UnitScores:
    """Retrieval scores of the KV heads, each the best of its query heads: (layers, kv_heads)."""
    ids = target.calibration(TOKENS)

    def measure() -> Tensor:
        cases = needles(ids, target.tokenizer(), cases=CASES, length=_length(ids))
        with _shown("retrieval scores of the heads") as bar:
            scores = retrieval_scores(target.model, cases, bar)
        parts = anatomy(target.model)
        return scores.scores.view(len(parts.layers), parts.kv_heads, -1).amax(-1)

    return UnitScores("kv_head", stored(target.model, "retrieval", _version(ids), measure))


def gates_of(target: Target) -> UnitScores:
    """Gate scores of the KV heads: (layers, kv_heads)."""
    ids = target.calibration(TOKENS)

    def measure() -> Tensor:
        length = _length(ids)
        cases = needles(ids, target.tokenizer(), cases=CASES, length=length)
        room = ids.shape[1] - length
        texts = [ids[:, start : start + length] for start in range(0, room + 1, max(1, room // 4))][:4]
        with _shown("gate scores of the KV heads") as bar:
            return gate_scores(target.model, cases, texts, progress=bar).scores

    return UnitScores("kv_head", stored(target.model, "gates", _version(ids), measure))


def _length(ids: Tensor) -> int:
    return min(LENGTH, ids.shape[1] // 2)


def _version(ids: Tensor) -> str:
    text = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]
    return f"1 {CASES} {LENGTH} {text}"


class _shown:
    """A bar in the terminal while something is measured; nothing where there is none."""

    def __init__(self, what: str):
        console = Console(stderr=True)
        self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(f"measuring {what}", total=1.0)

    def __enter__(self) -> _shown:
        self.bar.start()
        return self

    def __call__(self, done: float) -> None:
        self.bar.update(self.task, completed=done)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
