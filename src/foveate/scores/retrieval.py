"""Retrieval scores: which heads look at what they copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from foveate.data.needles import Needle
from foveate.methods import UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.attention import Call, replaced_attention, weights_of


@torch.no_grad()
def retrieval_scores(
    model: PreTrainedModel, cases: Sequence[Needle], progress: Callable[[float], None] = lambda done: None
) -> UnitScores:
    """How often a head's most attended token is the very token of the needle that comes next (section 2).

    For each token of the answer, the query that predicts it is looked at: a head scores if the entry that it attends
    to most lies in the needle and is that token. The score is the share of answer tokens at which it does. The answer
    is read, not generated, so that a model that fails to answer is scored too.

    Args:
        model: a causal language model.
        cases: needles in text, `foveate.data.needles.needles`.
        progress: called with the fraction done.

    Returns:
        UnitScores of kind "head": (layers, heads), 0 to 1.

    Source: Retrieval Head Mechanistically Explains Long-Context Factuality (2024), section 2.

    Example:
        >>> import foveate as fv, torch
        >>> from foveate.data.needles import Needle
        >>> text = torch.randint(3, 100, (1, 32))
        >>> case = Needle(text, 8, 12, text[:, 4:8], text[:, 8:12])
        >>> retrieval_scores(fv.tiny("llama"), [case]).scores.shape
        torch.Size([4, 4])
    """
    parts = anatomy(model)
    hits = torch.zeros(len(parts.layers), parts.heads)
    total = 0
    for done, case in enumerate(cases):
        question, answer = case.question.to(model.device), case.answer.to(model.device)
        text = case.text.to(model.device)
        cache = model(text, use_cache=True, logits_to_keep=1).past_key_values
        follow = torch.cat([question, answer[:, :-1]], dim=1)
        count = answer.shape[1]

        def look(call: Call) -> torch.Tensor:
            weights = weights_of(call)
            best = weights[0, :, :, -count:].flatten(0, 1).argmax(-1)  # noqa: B023 (called within this turn)
            inside = (best >= case.start) & (best < case.end)  # noqa: B023
            same = text[0, best.clamp(max=text.shape[1] - 1)] == answer[0]  # noqa: B023
            hits[call.layer] += (inside & same).sum(-1).cpu()
            out = weights.to(call.value.dtype) @ call.value[:, :, None]
            return out.flatten(1, 2)

        with replaced_attention(model, look, "retrieval"):
            model(follow, past_key_values=cache, use_cache=True, logits_to_keep=1)
        total += count
        progress((done + 1) / len(cases))
    return UnitScores("head", hits / total)
