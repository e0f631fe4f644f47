"""Scores of a model's heads, for what spends budgets by them. They only look; the model stays as it is."""

from foveate.scores.gates import gate_scores
from foveate.scores.known import Retrieved, gates_of, needle_length, retrieval_heads_of, retrieval_of, retrieved
from foveate.scores.retrieval import retrieval_hits, retrieval_scores

__all__ = [
    "Retrieved",
    "gate_scores",
    "gates_of",
    "needle_length",
    "retrieval_heads_of",
    "retrieval_hits",
    "retrieval_of",
    "retrieval_scores",
    "retrieved",
]
