"""Gate scores: what each KV head's view of the far past is worth, by integrated gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.data.needles import Needle
from foveate.methods import UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.attention import Call, replaced_attention, weights_of
from foveate.models.caches import with_cache


def gate_scores(
    model: PreTrainedModel,
    cases: Sequence[Needle],
    texts: Sequence[Tensor] = (),
    *,
    window: int = 128,
    sinks: int = 4,
    steps: int = 6,
    share: float = 0.5,
    progress: Callable[[float], None] = lambda done: None,
) -> UnitScores:
    """What each KV head's view of the far past adds to the log-probability of an answer, and of plain text.

    A gate of each KV head blends what it would attend to with all entries, and what it would with `sinks` first and
    `window` last ones of the text: out = gate * full + (1 - gate) * thin. The score is the integral, over all gates
    opened together from 0 to 1, of the log-probability's derivative by the gate: the scores of all heads add up to what
    the far past is worth in all.

    Args:
        model: a causal language model.
        cases: needles in text; the log-probability is the answer's, after the question.
        texts: LongTensor (1, length) each; the log-probability is that of the last 64 tokens after the others.
        window, sinks: entries of the thin attention, counted at the end of the text that came before.
        steps: points at which the derivative is taken.
        share: weight of the texts' scores, each normalised to a sum of 1 in absolute value; the needles' weigh 1.
        progress: called with the fraction done.

    Returns:
        UnitScores of kind "kv_head": (layers, kv_heads).

    Source: Axiomatic Attribution for Deep Networks (2017), equation 1, over gates as in Are Sixteen Heads Really Better
    than One? (2019), section 4.1 (there: the gradient at open gates alone).

    Example:
        >>> import foveate as fv, torch
        >>> from foveate.data.needles import Needle
        >>> text = torch.randint(3, 100, (1, 32))
        >>> case = Needle(text, 8, 12, text[:, 4:8], text[:, 8:12])
        >>> gate_scores(fv.tiny("llama"), [case], window=4, steps=2).scores.shape
        torch.Size([4, 2])
    """
    jobs = [(case.text, torch.cat([case.question, case.answer], 1), case.answer.shape[1]) for case in cases]
    tail = 64
    jobs += [(text[:, :-tail], text[:, -tail:], tail - 1) for text in texts]
    sums = []
    for done, (text, follow, scored) in enumerate(jobs):
        sums.append(_integrated(model, text, follow, scored, window, sinks, steps))
        progress((done + 1) / len(jobs))
    total: float | Tensor = 0.0
    for weight, group in ((1.0, sums[: len(cases)]), (share, sums[len(cases) :])):
        if group:
            together = torch.stack(group).sum(0)
            total = total + weight * together / together.abs().sum()
    assert isinstance(total, Tensor)  # there is a case or a text
    return UnitScores("kv_head", total)


def _integrated(
    model: PreTrainedModel, text: Tensor, follow: Tensor, scored: int, window: int, sinks: int, steps: int
) -> Tensor:
    """The integral (layers, kv_heads) for the log-probability of the last `scored` tokens of `follow` after `text`."""
    parts = anatomy(model)
    text, follow = text.to(model.device), follow.to(model.device)
    with torch.no_grad():
        read = model(text, use_cache=True, logits_to_keep=1).past_key_values
    length = text.shape[1]
    at = torch.arange(length + follow.shape[1], device=model.device)
    near = (at < sinks) | (at >= length - window)
    total = torch.zeros(len(parts.layers), parts.kv_heads)
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        for step in range(steps):
            gates = torch.full(total.shape, (step + 0.5) / steps, device=model.device, requires_grad=True)

            def blend(call: Call) -> Tensor:
                gate = gates[call.layer][:, None, None, None]  # noqa: B023 (called within this turn)
                weights = gate * weights_of(call) + (1 - gate) * weights_of(call, near)
                return (weights.to(call.value.dtype) @ call.value[:, :, None]).flatten(1, 2)

            with torch.enable_grad(), replaced_attention(model, blend, "gates"):
                out = model(follow, **with_cache(copy.deepcopy(read)), use_cache=True)
                logp = out.logits[0, -scored - 1 : -1].float().log_softmax(-1)
                goal = logp.gather(-1, follow[0, -scored:, None]).sum()
                total += torch.autograd.grad(goal, gates)[0].float().cpu() / steps
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return total
