"""MiniLM: the student learns how the original's last layer relates tokens: by its attention and by its values."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.heal.base import heal, way
from foveate.heal.train import Trained, last_hidden
from foveate.measure.bootstrap import perplexity, perplexity_ratio
from foveate.methods import Paper
from foveate.models.anatomy import LayerParts, anatomy
from foveate.models.surgery import Surgery, cut, has_attention, settle
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks.base import Bench, passages, surprisal

_NAME = "foveate-relations"


@way("minilm")
class MiniLm(Trained):
    """Deep self-attention distillation: only the last layer that attends is compared, so depth and width are free.

    Two losses, summed (paper's section 3): the KL divergence, original to student, of the attention distributions
    softmax(Q K^T / sqrt(d)) of each head (eq. 4), and of the value relations softmax(V V^T / sqrt(d)) of each head
    (eq. 5 and 6); each is a mean over heads and tokens. As in the paper the student has as many heads in that layer,
    of whatever size. The paper's models look both ways; ours decode, so that in both relations a token sees what comes
    before it, and of grouped heads each KV head has one value relation: that is ours.

    What comes after that attention (its output map, the last MLP, the final norm, the head) learns nothing here. The
    paper fine-tunes afterwards; `distill` does that, too.

    Fields:
        attention: the weight of the attention distributions.
        values: the weight of the value relations.

    Example:
        >>> import foveate as fv
        >>> from foveate.heal import heal
        >>> teacher, student = fv.tiny("llama"), fv.tiny("llama", num_hidden_layers=2, seed=1)
        >>> heal(student, teacher, "minilm:tokens=1k,batch=4,length=32,data=samples", progress=False).tokens
        1024
    """

    paper = Paper(
        "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
        2020,
        "https://arxiv.org/abs/2002.10957",
    )
    claim = (
        "the last layer's attention and value relations teach a shallower student more than attention alone or logits"
    )

    attention: float = 1.0
    values: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.attention, self.values) < 0 or not (self.attention or self.values):
            raise FoveateError(f"{self}: attention and values must not be below 0, nor both 0.")

    def objective(self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> nn.Module:
        relations = Relations(student, teacher, self)
        relations.check(rows[:1, :8])
        return relations


@dataclass(frozen=True)
class Vectors:
    """What one attention call relates, positions included: q (batch, head, token, d), k and v (batch, kv_head, ...)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float
    softcap: float | None


class Relations(nn.Module):
    """The loss of MiniLM, a mean over heads and tokens: `forward(ids (batch, length)) -> scalar`."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, spec: MiniLm):
        super().__init__()
        self.student = student
        self.models = (student, teacher)
        self.spec = spec
        self.eager = [_last(model).module for model in self.models]

    def forward(self, ids: Tensor) -> Tensor:
        student, teacher = self.models
        with torch.no_grad():
            theirs = _vectors(teacher, ids)
        mine = _vectors(student, ids)
        loss = torch.zeros((), device=ids.device)
        if self.spec.attention:
            loss = loss + self.spec.attention * _divergence(_attention(theirs), _attention(mine))
        if self.spec.values:
            loss = loss + self.spec.values * _divergence(_relations(theirs), _relations(mine))
        return loss

    def check(self, ids: Tensor) -> None:
        """Raise FoveateError where the two last layers can't be compared, head by head."""
        with torch.no_grad():
            mine, theirs = (_vectors(model, ids) for model in self.models)
        for what, m, t in (("query", mine.q, theirs.q), ("KV", mine.v, theirs.v)):
            if m.shape[1] != t.shape[1]:
                raise FoveateError(
                    f"minilm compares the last layers' heads one by one, and the student's has {m.shape[1]} {what} "
                    f"heads, the original's {t.shape[1]}: heal with distill, or keep all heads of the last layer."
                )


def _attention(vectors: Vectors) -> Tensor:
    """Log attention distributions, float32 (batch, head, token, token)."""
    k = vectors.k.repeat_interleave(vectors.q.shape[1] // vectors.k.shape[1], dim=1)
    return _related(vectors.q, k, vectors.scaling, vectors.softcap)


def _relations(vectors: Vectors) -> Tensor:
    """Log value relations, float32 (batch, kv_head, token, token)."""
    return _related(vectors.v, vectors.v, vectors.v.shape[-1] ** -0.5, None)


def _related(a: Tensor, b: Tensor, scaling: float, softcap: float | None) -> Tensor:
    scores = (a @ b.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=a.device).triu(1)
    return scores.masked_fill(later, -1e9).log_softmax(-1)  # not -inf: nothing times it has to be nothing


def _divergence(theirs: Tensor, mine: Tensor) -> Tensor:
    """KL of log distributions (..., token, token), summed over the last, a mean over the rest."""
    return (theirs.exp() * (theirs - mine)).sum(-1).mean()


# ---- what the last layer's attention is called with -----------------------------------------------------------------

_SEEN: weakref.WeakKeyDictionary[nn.Module, Vectors] = weakref.WeakKeyDictionary()


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface. What the layer goes on with is of no interest."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    _SEEN[module] = Vectors(query, key, value, scaling, softcap)
    return query.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _record)


def _last(model: PreTrainedModel) -> LayerParts:
    attending = [layer for layer in anatomy(model).layers if has_attention(layer)]
    if not attending:
        raise FoveateError("minilm compares attention, and no layer of this model attends: heal with distill.")
    return attending[-1]


@contextmanager
def _recorded(attention: Any) -> Iterator[None]:
    before = attention.config
    attention.config = copy.copy(before)
    attention.config._attn_implementation = _NAME
    try:
        yield
    finally:
        attention.config = before


def _vectors(model: PreTrainedModel, ids: Tensor) -> Vectors:
    attention = _last(model).attention
    if not hasattr(attention, "config"):
        raise FoveateError(
            f"minilm reads queries, keys and values, and the last layer's {type(attention).__name__} has "
            "none of transformers' attention: heal with distill."
        )
    with _recorded(attention):
        last_hidden(model, ids)
    if attention not in _SEEN:
        raise FoveateError(
            f"minilm reads queries, keys and values, and the last layer's {type(attention).__name__} doesn't hand them "
            "to transformers' attention interface: heal with distill."
        )
    return _SEEN.pop(attention)


# ---- the claim ------------------------------------------------------------------------------------------------------

STEPS = {"original": 160, "taught": 80, "tuned": 40}


@claim("minilm")
class MiniLmClaim(Claim):
    statement = (
        "a shallower student that learns the original's last-layer attention and value relations, and is then "
        "fine-tuned, does better than one that learned the attention alone, or the logits"
    )
    setting = (
        "an original of 4 layers, 128 wide, trained on the spot on the bytes of calibration text for "
        f"{STEPS['original']} steps of 2,048; students of its layers 1 and 3 learn for {STEPS['taught']} steps by "
        f"relations, attention alone, logits alone, or not at all, and {STEPS['tuned']} steps of plain next-byte "
        "training then; perplexity a byte on 48 passages of 256 bytes of evaluation text; far from the paper's size"
    )

    def run(self, bench: Bench) -> Finding:
        common, tokenizer = "data=prose,batch=16,length=128", tiny_tokenizer()
        text = "logits=0,hidden=0,text=1"
        arms = {
            "relations": "minilm:",
            "attention": "minilm:values=0,",
            "logits": "distill:hidden=0,",
            "untaught": None,
        }
        done = 0

        def learn(student: PreTrainedModel, spec: str, steps: int) -> None:
            nonlocal done
            heal(student, original, f"{spec}{common},tokens={2048 * steps}", tokenizer=tokenizer, progress=False)
            done += steps
            bench.progress(done / (sum(STEPS.values()) + 3 * (STEPS["taught"] + STEPS["tuned"])))

        sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
        original, learner = tiny("llama", seed=1, **sizes), tiny("llama", **sizes)
        learn(learner, f"distill:{text},lr=3e-3,", STEPS["original"])
        original = learner
        texts = passages(Bench(original, tokenizer, bench.text), 48, 256)

        def read(model: PreTrainedModel) -> list[float]:
            with torch.no_grad():
                return [float(surprisal(model(ids).logits[:, :-1], ids[:, 1:]).sum()) for ids in texts]

        nll = {"original": read(original)}
        for name, spec in arms.items():
            student = _half(original)
            if spec is not None:
                learn(student, f"{spec}lr=1e-3,", STEPS["taught"])
            learn(student, f"distill:{text},seed=1,lr=1e-3,", STEPS["tuned"])
            nll[name] = read(student)
        counts = [255] * len(texts)
        ratio = {name: perplexity_ratio(nll["relations"], nll[name], counts) for name in list(arms)[1:]}
        return Finding(
            {name: perplexity(each, counts) for name, each in nll.items()}
            | {f"relations_over_{name}": each for name, each in ratio.items()},
            {
                "relations teach more than attention alone": ratio["attention"].high < 1,
                "relations teach more than logits": ratio["logits"].high < 1,
                "relations teach more than nothing": ratio["untaught"].high < 1,
            },
        )


def _half(model: PreTrainedModel) -> PreTrainedModel:
    """Every second layer of a copy, the last one among them."""
    student = copy.deepcopy(model)
    layers = len(anatomy(student).layers)
    keep = [torch.arange((layers - 1 - index) % 2 == 0) for index in range(layers)]
    cut(student, "layer", keep, Surgery())
    settle(student)
    return student
