"""Needles: facts hidden in a long text, and questions that only they answer, to score heads on."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foveate.data.text import tokens
from foveate.errors import FoveateError

WORDINGS = (
    ("The secret number is {key}. Don't forget it: {key} is the secret number.", "The secret number is"),
    ("Note that the access code of the office is {key}.", "Question: What is the access code?\nAnswer: It is"),
    ("The password is {key}. Remember it: {key} is the password.", "As said above, the password is"),
    ("The magic number for Paris is: {key}.", "What is the magic number for Paris mentioned above? It is"),
    ("My locker opens with {key}, and nobody else knows that.", "My locker opens with"),
    ("Flight {key} leaves at noon.", "Which flight leaves at noon? At noon leaves flight"),
)
"""Sentences with a key, and the questions for it. The task `passkey`, which judges, asks in other words."""


@dataclass(frozen=True)
class Needle:
    """A text with a fact in it, and a question after it.

    Attributes:
        text: LongTensor (1, length): the passage with the sentence in it.
        start, end: the key's tokens in `text`, where it stands first.
        question: LongTensor (1, n): to be read after the text.
        answer: LongTensor (1, m): the key's tokens, as they follow on the question.
    """

    text: Tensor
    start: int
    end: int
    question: Tensor
    answer: Tensor


def needles(
    ids: Tensor, tokenizer: PreTrainedTokenizerBase, *, cases: int, length: int = 1024, digits: int = 5, seed: int = 0
) -> list[Needle]:
    """Cases with another passage, wording, number and depth each.

    Args:
        ids: LongTensor (1, n): the tokens that passages are taken from; calibration text.
        tokenizer: the model's.
        cases: how many.
        length: tokens of the passage with the sentence.
        digits: length of the number.
        seed: which numbers, passages and depths.

    Raises:
        FoveateError: there are too few tokens.

    Example:
        >>> from foveate.models.load import load
        >>> model, tokenizer = load("smollm2-135m")
        >>> from foveate.data.text import load_text, tokens
        >>> ids = tokens(load_text("prose").calibration, tokenizer, length=2048)
        >>> case = needles(ids, tokenizer, cases=1, length=256)[0]
        >>> case.text.shape, tokenizer.decode(case.text[0, case.start : case.end]) == tokenizer.decode(case.answer[0])
        (torch.Size([1, 256]), True)
    """
    rng = random.Random(seed)
    source = ids.cpu()  # where the tokenizer gives its own
    found = []
    for case in range(cases):
        sentence, question = WORDINGS[case % len(WORDINGS)]
        key = str(rng.randrange(10 ** (digits - 1), 10**digits))
        before, after = sentence.split("{key}", 1)
        # The key is cut into tokens as the question's answer is: with a space before it.
        lead = tokens("\n\n" + before.rstrip(), tokenizer)
        together, alone = tokens(f"{question} {key}", tokenizer), tokens(question, tokenizer)
        shared = int((together[0, : alone.shape[1]] == alone[0]).long().cumprod(0).sum())
        answer, asked = together[:, shared:], tokens("\n\n" + question, tokenizer)
        rest = tokens(after.format(key=key) + "\n\n", tokenizer)
        needle = torch.cat([lead, answer, rest], dim=1)
        room = length - needle.shape[1]
        if room < 2 or source.shape[1] <= room:
            raise FoveateError(
                f"there are {source.shape[1]} tokens of calibration text, and needles in {length} tokens were asked "
                "for: give a longer text."
            )
        start = rng.randrange(source.shape[1] - room)
        at = round((case + rng.random()) / cases * room)
        passage = source[:, start : start + room]
        first = at + lead.shape[1]
        found.append(
            Needle(
                torch.cat([passage[:, :at], needle, passage[:, at:]], dim=1),
                first,
                first + answer.shape[1],
                asked,
                answer,
            )
        )
    return found
