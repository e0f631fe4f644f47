"""Each head's attention over one short passage, for the page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.models.anatomy import Anatomy
from foveate.models.attention import Call, replaced_attention
from foveate.probes.watch import in_blocks

PASSAGE = """The harbour code is 48213. Mira wrote it on a card, put the card into her coat, and left.

In the evening Mira asked Tom: "What is the harbour code?" Tom looked into her coat, found the card, and read: "The \
harbour code is 48213."

for boat in harbour:
    boat.open(code)
"""
"""What the page shows attention over where the reader gives no passage: something to copy, to continue and to find."""

TOKENS = 96
"""Of a passage, at most."""

BYTES = 6_000_000
"""Of all heads' attention on the page, at most: a model with many heads gets a shorter passage."""


@dataclass(frozen=True)
class Attended:
    """Attention over a passage.

    Attributes:
        tokens: the passage, token by token.
        heads: for each layer, for each head, the lower triangle of its weights row by row: a byte each, in base64. A
            byte b stands for a weight of (b / 255) squared, so that small weights are told apart.
    """

    tokens: list[str]
    heads: list[list[str]]


def passage_text(path: Path | None) -> str | None:
    """The text of a passage's file; None without one.

    Raises:
        FoveateError: it can't be read, or is no text.
    """
    if path is None:
        return None
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FoveateError(f"{path} is not UTF-8 text (at byte {error.start}): give a text file.") from error
    except OSError as error:
        raise FoveateError(f"the passage {path} can't be read ({error.strerror}): give a text file.") from error


def passage_ids(passage: str, tokenizer: PreTrainedTokenizerBase, parts: Anatomy) -> Tensor:
    """The passage's first tokens, LongTensor (1, token): as many as the page can hold.

    Raises:
        FoveateError: an empty passage.
    """
    if not passage.strip():
        raise FoveateError("the passage is empty: give a text of at least two words, or no passage.")
    heads = len(parts.layers) * parts.heads
    room = int((2 * BYTES * 0.75 / heads) ** 0.5)
    ids: Tensor = tokens(passage, tokenizer)
    return ids[:, : max(8, min(TOKENS, room, parts.max_positions))]


@torch.no_grad()
def attended(model: PreTrainedModel, ids: Tensor, tokenizer: PreTrainedTokenizerBase, parts: Anatomy) -> Attended:
    """Every head's attention over token ids (1, token), in one forward."""
    heads: list[list[str]] = [[] for _ in parts.layers]
    count = ids.shape[1]
    below = torch.ones(count, count, dtype=torch.bool).tril()

    def note(layer: int, start: int, weights: Tensor, call: Call) -> None:
        squeezed = (255 * weights.float().sqrt()).round().to("cpu", torch.uint8)
        heads[layer] = [base64.b64encode(head[below].numpy().tobytes()).decode() for head in squeezed]

    with replaced_attention(model, in_blocks(note), "a reading"):
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    return Attended([str(tokenizer.decode([i])) for i in ids[0].tolist()], heads)
