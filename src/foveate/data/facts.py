"""Facts: short prompts that a model completes from what it knows, with the subject's place in them.

A fact is a subject, the words around it, and the word that follows. `known_facts` gives those which a model completes
rightly; causal experiments on facts can only be made on these. The list is ours: what everybody knows, so that small
models know some of it, and no subject at the very start of its prompt, where many models rest their attention.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import tokens
from foveate.errors import FoveateError

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Hungary": "Budapest",
    "Turkey": "Ankara",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Thailand": "Bangkok",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "England": "London",
    "Chile": "Santiago",
    "Canada": "Ottawa",
}
LANGUAGES = {
    "France": "French",
    "Germany": "German",
    "Italy": "Italian",
    "Spain": "Spanish",
    "Japan": "Japanese",
    "China": "Chinese",
    "Russia": "Russian",
    "Greece": "Greek",
    "Poland": "Polish",
    "Sweden": "Swedish",
    "Brazil": "Portuguese",
    "Mexico": "Spanish",
    "Turkey": "Turkish",
    "Hungary": "Hungarian",
    "Egypt": "Arabic",
}
LANDMARKS = {
    "the Eiffel Tower": "Paris",
    "the Louvre": "Paris",
    "the Colosseum": "Rome",
    "Big Ben": "London",
    "the Acropolis": "Athens",
    "the Brandenburg Gate": "Berlin",
    "the Kremlin": "Moscow",
    "the Statue of Liberty": "New",
    "the Golden Gate Bridge": "San",
}
TEMPLATES = {
    "capital": ("The capital of {} is", "The capital city of {} is called"),
    "language": ("The official language of {} is", "Most people in {} speak"),
    "city": ("As everybody knows, {} is located in the city of", "Tourists know that {} is in the city of"),
}
"""By relation: the words around the subject `{}`, in several wordings; the answer follows."""


class Fact(NamedTuple):
    """Something known.

    Attributes:
        relation: what the answer is to the subject: "capital".
        subject: "France".
        template: the prompt with `{}` in the subject's place: "The capital of {} is".
        answer: "Paris", which follows after a space (or at once, where the template ends in one). Its first token is
            what counts.
    """

    relation: str
    subject: str
    template: str
    answer: str


FACTS: tuple[Fact, ...] = tuple(
    Fact(relation, subject, template, answer)
    for relation, pairs in (("capital", CAPITALS), ("language", LANGUAGES), ("city", LANDMARKS))
    for template in TEMPLATES[relation]
    for subject, answer in pairs.items()
)
"""All facts in all wordings."""


@dataclass(frozen=True)
class Prompt:
    """A fact as tokens.

    Attributes:
        fact: which.
        ids: LongTensor (1, token): the prompt, on the CPU.
        start, end: the subject's tokens in it.
        answer: the answer's first token.
        probability: what the model gave to that token, where it was asked; else NaN.
    """

    fact: Fact
    ids: Tensor
    start: int
    end: int
    answer: int
    probability: float = float("nan")

    @property
    def last(self) -> int:
        """The position of the prompt's last token."""
        return self.ids.shape[1] - 1


def prompt_of(fact: Fact, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A fact as tokens, with the subject's place.

    Raises:
        FoveateError: the template has no place for the subject, or the subject or the answer comes to no token.

    Example:
        >>> import foveate as fv
        >>> prompt = prompt_of(Fact("capital", "Italy", "Of {} it is", "Rome"), fv.tiny_tokenizer())
        >>> prompt.start, prompt.end, prompt.ids.shape
        (2, 8, torch.Size([1, 14]))
    """
    before, found, _ = fact.template.partition("{}")
    if not found:
        raise FoveateError(f"the template {fact.template!r} has no place for the subject: write {{}} where it stands.")
    text = fact.template.replace("{}", fact.subject)
    ids = tokens(text, tokenizer)
    # A space belongs to the word after it, so the subject's tokens start with theirs.
    start = _shared(before.rstrip(), ids, tokenizer)
    end = _shared(before + fact.subject, ids, tokenizer)
    follows = tokens(text + ("" if text[-1:].isspace() else " ") + fact.answer, tokenizer)
    at = int((follows[0, : ids.shape[1]] == ids[0]).long().cumprod(0).sum())
    if end <= start or at < ids.shape[1] or follows.shape[1] <= at:
        raise FoveateError(
            f"this tokenizer cuts {text!r} so that subject, prompt and answer can't be told apart: give other words."
        )
    return Prompt(fact, ids, start, end, int(follows[0, at]))


def _shared(part: str, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens of `ids` are those of `part`, which it starts with."""
    if not part:
        return 0
    own = tokens(part, tokenizer)
    n = min(own.shape[1], ids.shape[1])
    return int((own[0, :n] == ids[0, :n]).long().cumprod(0).sum())


@torch.no_grad()
def known_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact] = FACTS,
    *,
    most: int | None = None,
    least: float = 0.0,
) -> list[Prompt]:
    """The facts that a model completes rightly: of all tokens, the answer's first is the likeliest.

    Prompts of equal length are read together.

    Args:
        model, tokenizer: who is asked.
        facts: what is asked.
        most: how many at most, one fact of each subject and relation before a second wording of it; None: all.
        least: the least probability of the answer.

    Returns:
        In the order of `facts`; facts that this tokenizer can't tell apart, or that are longer than the model's
        positions, are left out.

    Example:
        >>> import foveate as fv
        >>> known_facts(fv.tiny("llama"), fv.tiny_tokenizer(), FACTS[:4])  # random weights know nothing
        []
    """
    prompts = []
    longest = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    for fact in facts:
        try:
            prompt = prompt_of(fact, tokenizer)
        except FoveateError:
            continue
        if prompt.ids.shape[1] < longest:
            prompts.append(prompt)
    known: dict[int, Prompt] = {}
    for group in by_length(prompts):
        ids = torch.cat([prompts[i].ids for i in group]).to(model.device)
        probabilities = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float().softmax(-1)
        for i, row in zip(group, probabilities, strict=True):
            p = float(row[prompts[i].answer])
            # Not argmax: where two are equally likely, as on constant weights, none is known.
            if p >= least and int((row >= p).sum()) == 1:
                known[i] = replace(prompts[i], probability=p)
    if most is None:
        return [known[i] for i in sorted(known)]
    seen: dict[tuple[str, str], int] = {}
    ranked = []
    for i in sorted(known):
        key = known[i].fact.relation, known[i].fact.subject
        seen[key] = seen.get(key, 0) + 1
        ranked.append((seen[key], i))
    return [known[i] for i in sorted(i for _, i in sorted(ranked)[:most])]


def by_length(prompts: Sequence[Prompt]) -> list[list[int]]:
    """The prompts' indices in groups of equal length and equal place of the subject, to be read as one batch."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault((prompt.ids.shape[1], prompt.start, prompt.end), []).append(i)
    return list(groups.values())
