"""Unordered: documents are read so that their order in the prompt can't matter."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, function
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.attention import Call, replaced_attention
from foveate.models.rotation import rotate
from foveate.tasks.base import Bench, passages
from foveate.tasks.copying import NOUNS

BLOCK = 1 << 24
"""Attention weights held at a time (64 MiB in float32)."""


@function(
    "unordered",
    role="steer",
    paper=Paper(
        "Eliminating Position Bias of Language Models: A Mechanistic Approach", 2024, "https://arxiv.org/abs/2407.01100"
    ),
    claim="documents can be read so that their order changes nothing, without training and at little loss",
)
@contextmanager
def unordered(model: PreTrainedModel, prefix: Tensor | None, documents: Sequence[Tensor]) -> Iterator[DynamicCache]:
    """Read documents as a set: inside the block, what follows on the cache is the same in whatever order they came.

    Within a document attention is causal, between documents it goes both ways. To a token, each head orders the
    documents by how much it would attend to them if nothing had a position, averaged over a document's tokens: the
    more, the closer. A document's own tokens agree on one order, by the sum over them, with their document last; each
    token after the documents has an order of its own (section 3.3). So nothing depends on the prompt's order. What
    comes before and after the documents is read as ever, and new tokens too see them in no order.

    The orders are as exact as the arithmetic: in less than float64, two documents that matter to a head almost equally
    may change places through rounding, which moves the logits a little.

    Ours: keys stay as they are, each document's as if it came right after the prefix, and a query is turned by how far
    it would be from each document, which gives the same attention; so a text of n tokens and k documents takes n * k
    rotations and no n * n. The softmax that orders the documents runs over the documents' tokens that the query sees.

    Args:
        model: a model with rotary positions.
        prefix: token ids before the documents, LongTensor (token,) or (1, token); None = nothing.
        documents: token ids, LongTensor (token,) or (1, token) each; at least one.

    Yields:
        The cache with prefix and documents. Inside the block, forwards and `model.generate` go on from it, the first
        with at least one token; a copy of it serves several continuations. Without padding. After the block, it is of
        no use: plain attention would see the documents on top of each other.

    Raises:
        FoveateError: no or empty documents, a model whose positions can't be moved, another technique that replaces
            attention in force on it; inside the block, a forward without the cache.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> prefix, one, other, question = (torch.arange(start, start + 8)[None] for start in (3, 40, 80, 120))
        >>> def answer(*documents):
        ...     with unordered(model, prefix, documents) as cache:
        ...         return model(question, past_key_values=cache).logits
        >>> torch.allclose(answer(one, other), answer(other, one), atol=1e-5)
        True
        >>> with unordered(model, prefix, [one, other]) as cache:
        ...     ids = model.generate(torch.cat([prefix, one, other, question], 1), past_key_values=cache,
        ...                          max_new_tokens=4, do_sample=False)
    """
    parts = anatomy(model)
    if parts.positions != "rotary":
        raise FoveateError(
            f"unordered: documents are ordered anew for each token by rotating its query, but the positions of this "
            f"{parts.family} model are not rotary: take another model."
        )
    parts.require_static_rotary()
    if not documents:
        raise FoveateError("unordered got no documents: give at least one, or call the model itself.")
    rows = [_one_row(document, "a document") for document in documents]
    before = rows[0][:, :0] if prefix is None or prefix.numel() == 0 else _one_row(prefix, "the prefix")
    order = _Order(parts, before.shape[1], [row.shape[1] for row in rows])
    cache: Any = DynamicCache()  # knows nothing of the layers' own windows, and keeps every entry
    with replaced_attention(model, order.attention, "unordered"):
        ids = torch.cat([before, *rows], dim=1).to(model.device)
        with torch.no_grad():
            parts.base(ids, position_ids=order.base[None].to(model.device), past_key_values=cache, use_cache=True)
        if sum(layer.is_initialized for layer in cache.layers) < len(parts.layers):
            raise FoveateError("unordered: some layers are skipped by a recipe in force: leave its block first.")
        yield cache


def _one_row(ids: Tensor, what: str) -> Tensor:
    if ids.dim() > 2 or ids.numel() == 0 or (ids.dim() == 2 and len(ids) != 1):
        raise FoveateError(
            f"unordered: {what} has the shape {tuple(ids.shape)}: give ids of one text, as (token,) or (1, token)."
        )
    return ids.reshape(1, -1)


class _Order:
    """The attention over a prefix, documents in no order, and what follows.

    In the cache all documents start right after the prefix. `base` is where each token of these stands, (token,); what
    follows stands after all of them, as the model itself has it.
    """

    def __init__(self, parts: Anatomy, prefix: int, sizes: list[int]):
        self.parts, self.sizes, self.total = parts, torch.tensor(sizes), sum(sizes)
        self.prefix = slice(0, prefix)
        ends = (prefix + self.sizes.cumsum(0)).tolist()
        self.documents = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.end = prefix + self.total
        self.base = torch.cat([torch.arange(prefix), *(prefix + torch.arange(size) for size in sizes)])

    def attention(self, call: Call) -> Tensor:
        entries, queries = call.key.shape[2], call.query.shape[2]
        if entries == queries == self.end:
            outs = [self.look(call, call.query[:, :, self.prefix], self.prefix, [])] if self.prefix.stop else []
            for own in self.documents:
                outs.append(self.look(call, call.query[:, :, own], own, [s for s in self.documents if s != own]))
            return torch.cat(outs, dim=2)
        if entries - queries < self.end:
            raise FoveateError(
                "unordered: a forward was made without the cache that holds the documents: give it as "
                "past_key_values, or leave the block first."
            )
        after = slice(self.end, entries)
        return self.look(call, call.query, after, self.documents)

    def look(self, call: Call, query: Tensor, own: slice, others: list[slice]) -> Tensor:
        """What these queries, the last tokens of `own`, get from the prefix, from the others, and from their own."""
        count, whole = query.shape[2], own in self.documents
        sizes = torch.tensor([_size(s) for s in others], dtype=torch.long, device=query.device)
        entries = self.prefix.stop + int(sizes.sum()) + _size(own)
        step = max(1, BLOCK // (query.shape[0] * query.shape[1] * entries))
        blocks = [(query[:, :, i : i + step], own.stop - count + i) for i in range(0, count, step)]
        ranks = [self.importance(call, q, start, own, others) for q, start in blocks] if others else []
        if ranks and whole:  # all tokens of a document go by one order
            ranks = [torch.cat(ranks, dim=2).sum(2, keepdim=True)] * len(blocks)
        outs = []
        for i, (q, start) in enumerate(blocks):
            # A document comes after all others: how far its queries move from where the model has put them.
            moved = torch.full(q.shape[:3], int(sizes.sum()) if whole else 0, device=q.device)
            groups = [] if own == self.prefix else [(self.prefix, moved)]
            if others:
                starts = sizes.sum() - _through(sizes, ranks[i])  # of each, counted from the prefix's end
                groups += [(s, moved - starts[..., j]) for j, s in enumerate(others)]
            outs.append(self.attend(call, q, start, own, groups))
        return torch.cat(outs, dim=2)

    def attend(self, call: Call, query: Tensor, start: int, own: slice, groups: list[tuple[slice, Tensor]]) -> Tensor:
        """Attention to each group with the query turned by so many positions, and causally to their own segment."""
        frequencies, kv_heads = self.parts.inv_freq(call.layer), call.key.shape[1]
        assert frequencies is not None  # positions are rotary
        stands = self.at(torch.arange(start, start + query.shape[2], device=query.device))
        mine = slice(own.start, start + query.shape[2])
        pieces = []
        for where, turn in [*groups, (mine, None)]:
            turned = query if turn is None else rotate(query, turn, frequencies)
            logits = _logits(turned, call.key[:, :, where], call)
            columns = torch.arange(where.start, where.stop, device=query.device)
            distance = (stands if turn is None else stands + turn)[..., None] - self.at(columns)
            seen = distance >= 0
            if call.sliding_window is not None:
                seen = seen & (distance < call.sliding_window)
            pieces.append(logits.masked_fill(~seen, -torch.inf))
        weights = torch.cat(pieces, dim=-1).softmax(dim=-1).to(call.value.dtype).unflatten(1, (kv_heads, -1))
        values = torch.cat([call.value[:, :, where] for where, _ in groups] + [call.value[:, :, mine]], dim=2)
        return (weights @ values[:, :, None]).flatten(1, 2)

    def importance(self, call: Call, query: Tensor, start: int, own: slice, others: list[slice]) -> Tensor:
        """How much each query would attend to a token of each of the others without positions: (batch, head, query,
        other), float32 or wider."""
        frequencies = self.parts.inv_freq(call.layer)
        assert frequencies is not None
        at = torch.arange(start, start + query.shape[2], device=query.device)
        whole = own in self.documents
        columns = [torch.arange(s.start, s.stop, device=query.device) for s in ([*others, own] if whole else others)]
        which = torch.cat(columns)
        keys = call.key[:, :, which]
        bare = rotate(keys, (-self.at(which)).expand(keys.shape[:3]), frequencies)
        logits = _logits(rotate(query, (-self.at(at)).expand(query.shape[:3]), frequencies), bare, call)
        hidden = (which > at[:, None]) & (which >= own.start) & (which < own.stop)  # own tokens to come
        weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return torch.stack([w.mean(-1) for w in weights.split([len(c) for c in columns], -1)[: len(others)]], dim=-1)

    def at(self, index: Tensor) -> Tensor:
        """Where tokens stand, by their index in the cache."""
        base = self.base.to(index.device)
        return torch.where(index < self.end, base[index.clamp(max=self.end - 1)], index)


def _size(of: slice) -> int:
    return int(of.stop - of.start)


def _through(sizes: Tensor, ranks: Tensor) -> Tensor:
    """How many tokens there are from a document's start to the end of all, the most important being last.

    Args:
        sizes: (document,): their lengths.
        ranks: (..., document): how important each is.

    Returns:
        (..., document), int64.

    Example:
        >>> _through(torch.tensor([5, 3, 2]), torch.tensor([0.1, 0.9, 0.5])).tolist()
        [10, 3, 5]
    """
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(order).scatter(-1, order, sizes[order].cumsum(-1))


def _logits(query: Tensor, key: Tensor, call: Call) -> Tensor:
    """Attention logits (batch, head, query, entry) in float32 or wider."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    logits = (grouped @ key[:, :, None].transpose(-1, -2)).flatten(1, 2)
    logits = logits.to(torch.promote_types(query.dtype, torch.float32)) * call.scaling
    return logits if call.softcap is None else call.softcap * torch.tanh(logits / call.softcap)


PLACES = ("attic", "barn", "cellar", "garage", "library", "office", "pantry", "studio", "tower", "workshop")
CASES, COUNT, LENGTH = 40, 5, 24


@claim("unordered")
class OrderIsNothing(Claim):
    statement: ClassVar[str] = (
        "whatever the order of the documents, the outputs are the same (theorem 1), where the plain model's accuracy "
        "goes by where the right document stands; on average it answers as well (figure 4: 1.2 points more with 10 "
        "documents, 2.0 fewer with 20)"
    )
    setting: ClassVar[str] = (
        f"{CASES} cases of {COUNT} documents: {LENGTH} tokens of prose and a password of some place, a noun; the "
        "question names a place; an answer is right if of the nouns in the documents the right one is the most likely; "
        "the right document stands first, in the middle or last, the others keep their order"
    )

    def run(self, bench: Bench) -> Finding:
        model, spots = bench.model, (0, COUNT // 2, COUNT - 1)
        right: dict[str, list[list[float]]] = {"plain": [], "unordered": []}
        moved: dict[str, list[float]] = {"plain": [], "unordered": []}
        for case, (documents, question, nouns) in enumerate(_cases(bench)):
            orders = [[*documents[1 : spot + 1], documents[0], *documents[spot + 1 :]] for spot in spots]
            found = {"plain": _plain(model, orders, question)}
            rows = []
            for order in orders:
                with unordered(model, None, order) as cache, torch.no_grad():
                    rows.append(model(question, past_key_values=cache, logits_to_keep=1).logits[0, -1])
            found["unordered"] = torch.stack(rows)
            for name, logits in found.items():
                right[name].append((logits[:, nouns].argmax(-1) == 0).double().tolist())
                chances = logits.double().softmax(-1)
                moved[name].append(float((chances - chances[:1]).abs().sum(-1).max() / 2))
            bench.progress((case + 1) / CASES)
        by_spot = {
            f"{name}, right document {where}": mean([row[i] for row in rows])
            for name, rows in right.items()
            for i, where in enumerate(("first", "in the middle", "last"))
        }
        spread = {name: _spread(rows) for name, rows in right.items()}
        gained = mean([sum(a) / 3 - sum(b) / 3 for a, b in zip(right["unordered"], right["plain"], strict=True)])
        return Finding(
            by_spot
            | {f"{name}, all three": mean([sum(row) / 3 for row in rows]) for name, rows in right.items()}
            | {f"{name}, best place less worst": value for name, value in spread.items()}
            | {f"{name}, probability moved by the order": mean(rows) for name, rows in moved.items()}
            | {"accuracy gained": gained},
            {
                "the order moves less than 1% of the probability": mean(moved["unordered"]).high < 0.01,
                "it moves more than 5% in the plain model": mean(moved["plain"]).low > 0.05,
                "the accuracy goes less by where the right document stands": spread["unordered"].high
                < spread["plain"].low,
                "on average it does not answer clearly worse": gained.high >= 0,
            },
        )


def _cases(bench: Bench) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """Documents, the right one first; the question; and the first tokens of their nouns, in the same order."""
    rng, tokenizer, device = random.Random(0), bench.tokenizer, bench.model.device
    prose = passages(bench, CASES * COUNT, LENGTH)
    for case in range(CASES):
        places, nouns = rng.sample(PLACES, COUNT), rng.sample(NOUNS, COUNT)
        firsts = [int(tokens(f" {noun}", tokenizer)[0, 0]) for noun in nouns]
        while len(set(firsts)) < COUNT:  # some tokenizers cut two of them off at the same letters
            nouns = rng.sample(NOUNS, COUNT)
            firsts = [int(tokens(f" {noun}", tokenizer)[0, 0]) for noun in nouns]
        documents = []
        for i, (place, noun) in enumerate(zip(places, nouns, strict=True)):
            fact = tokens(f"\n\nThe password of the {place} is {noun}.\n\n", tokenizer).to(device)
            documents.append(torch.cat([prose[case * COUNT + i], fact], dim=1))
        asked = f"Question: What is the password of the {places[0]}?\nAnswer: The password of the {places[0]} is"
        yield documents, tokens(asked, tokenizer).to(device), torch.tensor(firsts, device=device)


def _plain(model: PreTrainedModel, orders: list[list[Tensor]], question: Tensor) -> Tensor:
    """The plain model's last logits, (order, vocab)."""
    ids = torch.cat([torch.cat([*order, question], dim=1) for order in orders])
    with torch.no_grad():
        return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def _spread(rows: list[list[float]]) -> Metric:
    """The accuracy at the best place less that at the worst; the interval is over cases, places as they were found."""
    columns = [sum(column) for column in zip(*rows, strict=True)]
    best, worst = columns.index(max(columns)), columns.index(min(columns))
    return mean([row[best] - row[worst] for row in rows])
