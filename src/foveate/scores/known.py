"""The scores of a target's KV heads on calibration text: measured once a model, then read from disk."""

from __future__ import annotations

from torch import Tensor

from foveate.data.needles import needles
from foveate.measure.shown import Shown
from foveate.methods import Target, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.stored import stored, text_digest
from foveate.scores.gates import gate_scores
from foveate.scores.retrieval import retrieval_scores

CASES = 12
LENGTH = 1024
TOKENS = 16384


def retrieval_of(target: Target) -> UnitScores:
    """Retrieval scores of the KV heads, each the best of its query heads: (layers, kv_heads)."""
    ids = target.calibration(TOKENS)

    def measure() -> dict[str, Tensor]:
        cases = needles(ids, target.tokenizer(), cases=CASES, length=_length(ids))
        with Shown("retrieval scores of the heads") as progress:
            heads = retrieval_scores(target.model, cases, progress).scores
        parts = anatomy(target.model)
        return {"scores": heads.view(len(parts.layers), parts.kv_heads, -1).amax(-1)}

    return UnitScores("kv_head", stored(target.model, "retrieval", _version(ids), measure)["scores"])


def gates_of(target: Target) -> UnitScores:
    """Gate scores of the KV heads: (layers, kv_heads)."""
    ids = target.calibration(TOKENS)

    def measure() -> dict[str, Tensor]:
        length = _length(ids)
        cases = needles(ids, target.tokenizer(), cases=CASES, length=length)
        room = ids.shape[1] - length
        texts = [ids[:, start : start + length] for start in range(0, room + 1, max(1, room // 4))][:4]
        with Shown("gate scores of the KV heads") as progress:
            return {"scores": gate_scores(target.model, cases, texts, progress=progress).scores}

    return UnitScores("kv_head", stored(target.model, "gates", _version(ids), measure)["scores"])


def _length(ids: Tensor) -> int:
    return min(LENGTH, ids.shape[1] // 2)


def _version(ids: Tensor) -> str:
    return f"1 {CASES} {LENGTH} {text_digest(ids)}"
