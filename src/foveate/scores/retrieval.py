"""Retrieval scores: which heads look at what they copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.data.needles import Needle
from foveate.methods import UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.attention import Call, replaced_attention, weights_of
from foveate.models.caches import with_cache


@torch.no_grad()
def retrieval_hits(
    model: PreTrainedModel, cases: Sequence[Needle], progress: Callable[[float], None] = lambda done: None
) -> Tensor:
    """At how many tokens of each answer a head looks most at the very token of the needle that comes next.

    For each token of the answer, the query that predicts it is looked at: a head hits if the entry that it attends to
    most lies in the needle and is that token. The answer is read, not generated, so that a model that fails to answer
    is scored too.

    Args:
        model: a causal language model.
        cases: needles in text, `foveate.data.needles.needles`.
        progress: called with the fraction done.

    Returns:
        (cases, layers, heads), float32 on the CPU.

    Example:
        >>> import foveate as fv, torch
        >>> from foveate.data.needles import Needle
        >>> text = torch.randint(3, 100, (1, 32))
        >>> case = Needle(text, 8, 12, text[:, 4:8], text[:, 8:12])
        >>> retrieval_hits(fv.tiny("llama"), [case, case]).shape
        torch.Size([2, 4, 4])
    """
    parts = anatomy(model)
    hits = torch.zeros(len(cases), len(parts.layers), parts.heads)
    for at, case in enumerate(cases):
        question, answer = case.question.to(model.device), case.answer.to(model.device)
        text = case.text.to(model.device)
        cache = model(text, use_cache=True, logits_to_keep=1).past_key_values
        follow = torch.cat([question, answer[:, :-1]], dim=1)
        count = answer.shape[1]

        def look(call: Call) -> Tensor:
            weights = weights_of(call)
            best = weights[0, :, :, -count:].flatten(0, 1).argmax(-1)  # noqa: B023 (called within this turn)
            # A layer with a window of its own holds the last entries only.
            best = best + text.shape[1] + follow.shape[1] - call.key.shape[2]  # noqa: B023
            inside = (best >= case.start) & (best < case.end)  # noqa: B023
            same = text[0, best.clamp(max=text.shape[1] - 1)] == answer[0]  # noqa: B023
            hits[at, call.layer] = (inside & same).sum(-1).float().cpu()  # noqa: B023
            out = weights.to(call.value.dtype) @ call.value[:, :, None]
            return out.flatten(1, 2)

        with replaced_attention(model, look, "retrieval"):
            model(follow, **with_cache(cache), use_cache=True, logits_to_keep=1)
        progress((at + 1) / len(cases))
    return hits


def retrieval_scores(
    model: PreTrainedModel, cases: Sequence[Needle], progress: Callable[[float], None] = lambda done: None
) -> UnitScores:
    """How often a head's most attended token is the very token of the needle that comes next (section 2).

    The score is the share of answer tokens, over all cases, at which it is: see `retrieval_hits`.

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
    return UnitScores("head", retrieval_hits(model, cases, progress).sum(0) / sum(c.answer.shape[1] for c in cases))
