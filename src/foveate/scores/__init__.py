"""Scores of a model's heads, for what spends budgets by them. They only look; the model stays as it is."""

from foveate.scores.gates import gate_scores
from foveate.scores.known import gates_of, retrieval_of
from foveate.scores.retrieval import retrieval_scores

__all__ = ["gate_scores", "gates_of", "retrieval_of", "retrieval_scores"]
