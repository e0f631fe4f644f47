"""Unordered: no order of the documents changes anything, and each token sees them as the paper says."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.anatomy import anatomy
from foveate.models.attention import replaced_attention
from foveate.models.rotation import rotate
from foveate.steer import unordered as module_file
from foveate.steer.unordered import unordered

GENERATOR = torch.Generator().manual_seed(3)
PREFIX, QUESTION = (torch.randint(3, 250, (1, n), generator=GENERATOR) for n in (5, 6))
DOCUMENTS = [torch.randint(3, 250, (1, n), generator=GENERATOR) for n in (7, 4, 9, 6)]
FAMILIES = ["llama", "qwen3", "gemma2", "gpt_neox", "phi3"]  # grouped heads, normed keys, softcaps, partial rotary


def answer(model, documents, prefix=PREFIX, question=QUESTION):
    with unordered(model, prefix, documents) as cache, torch.no_grad():
        return model(question, past_key_values=cache).logits


def plain(model, documents, prefix=PREFIX, question=QUESTION):
    ids = torch.cat([x for x in (prefix, *documents, question) if x is not None], dim=1)
    with torch.no_grad():
        return model(ids).logits[:, -question.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_order_of_the_documents_changes_anything(family):
    model = fv.tiny(family).double()
    whole = answer(model, DOCUMENTS)
    orders = list(permutations(DOCUMENTS))
    for order in orders if family == "llama" else orders[::7]:
        torch.testing.assert_close(answer(model, order), whole, atol=1e-9, rtol=0)
    assert (plain(model, DOCUMENTS) - plain(model, DOCUMENTS[::-1])).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_with_one_document_it_is_the_plain_model(family):
    model, one = fv.tiny(family).double(), DOCUMENTS[:1]
    least = 1e-5 if family == "gemma2" else 1e-9  # whose own attention has its softmax in float32
    for prefix in (PREFIX, None):
        torch.testing.assert_close(answer(model, one, prefix), plain(model, one, prefix), atol=least, rtol=0)


def test_windows_are_counted_in_the_places_that_tokens_then_have():
    model = fv.tiny("gemma2", sliding_window=8).double()
    torch.testing.assert_close(answer(model, DOCUMENTS[:1]), plain(model, DOCUMENTS[:1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(answer(model, DOCUMENTS), answer(model, DOCUMENTS[::-1]), atol=1e-9, rtol=0)
    assert (answer(model, DOCUMENTS) - answer(fv.tiny("gemma2").double(), DOCUMENTS)).abs().max() > 1e-3


class Slow:
    """The paper's section 3.3 spelled out: for each head and token, keys are put at their places and rotated there."""

    def __init__(self, model, sizes):
        self.parts, n = anatomy(model), PREFIX.shape[1]
        self.segments, at = [list(range(n))], n
        for size in sizes:
            self.segments.append(list(range(at, at + size)))
            at += size
        self.end = at
        self.base = list(range(n)) + [n + i for size in sizes for i in range(size)]

    def __call__(self, call):
        queries, entries = call.query.shape[2], call.key.shape[2]
        out = torch.zeros_like(call.query)
        base = torch.tensor(self.base + list(range(self.end, entries)))
        freq = self.parts.inv_freq(call.layer)
        bare = rotate(call.key, (-base).expand(call.key.shape[:3]), freq)
        asked = rotate(call.query, (-base[entries - queries :]).expand(call.query.shape[:3]), freq)
        group = call.query.shape[1] // call.key.shape[1]
        after = list(range(self.end, entries))
        for head in range(call.query.shape[1]):
            k, v = bare[0, head // group], call.value[0, head // group]
            for own in [*self.segments, after]:
                mine = [i for i in own if i >= entries - queries]
                if not mine:
                    continue
                document = own in self.segments[1:]
                others = [s for s in self.segments[1:] if s != own] if own != self.segments[0] else []
                importance = []
                for i in mine:
                    seen = [j for s in others for j in s] + ([j for j in own if j <= i] if document else [])
                    raw = (asked[0, head, i - entries + queries] @ k[seen].T * call.scaling).softmax(-1)
                    share = dict(zip(seen, raw.tolist(), strict=True))
                    importance.append([sum(share[j] for j in s) / len(s) for s in others])
                for i, own_importance in zip(mine, importance, strict=True):
                    scores = [sum(row[o] for row in importance) for o in range(len(others))]
                    scores = scores if document else own_importance
                    order = [others[o] for o in sorted(range(len(others)), key=lambda o: scores[o])]  # noqa: B023
                    line = [] if own == self.segments[0] else list(self.segments[0])
                    line += [j for s in order for j in s] + [j for j in own if j <= i]
                    places = torch.arange(len(line))
                    keys = rotate(k[line][None, None], places[None, None], freq)[0, 0]
                    q = asked[0, head, i - entries + queries][None, None, None]
                    q = rotate(q, torch.tensor([[[len(line) - 1]]]), freq)[0, 0, 0]
                    weights = (keys @ q * call.scaling).softmax(-1)
                    out[0, head, i - entries + queries] = weights @ v[line]
        return out


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("block", [1 << 24, 200])
def test_it_is_what_the_paper_says(family, block, monkeypatch):
    model = fv.tiny(family, num_hidden_layers=2).double()
    monkeypatch.setattr(module_file, "BLOCK", block)
    slow = Slow(model, [d.shape[1] for d in DOCUMENTS])
    monkeypatch.setattr(
        module_file, "replaced_attention", lambda model, attention, who: replaced_attention(model, slow, who)
    )
    expected = answer(model, DOCUMENTS)
    monkeypatch.undo()
    monkeypatch.setattr(module_file, "BLOCK", block)
    torch.testing.assert_close(answer(model, DOCUMENTS), expected, atol=1e-8, rtol=0)


def test_generation_goes_on_in_no_order():
    model = fv.tiny("llama").double()

    def told(documents):
        ids = torch.cat([PREFIX, *documents, QUESTION], dim=1)
        with unordered(model, PREFIX, documents) as cache:
            new = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        return new.tolist()

    def step_by_step(documents):
        ids, new = QUESTION, []
        with unordered(model, PREFIX, documents) as cache, torch.no_grad():
            for _ in range(12):
                ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
                new.append(int(ids))
        return new

    assert told(DOCUMENTS) == told(DOCUMENTS[::-1]) == step_by_step(DOCUMENTS[1:] + DOCUMENTS[:1])
    together = answer(model, DOCUMENTS, question=torch.cat([QUESTION, torch.tensor([told(DOCUMENTS)])], dim=1))
    assert together[0, 5:-1].argmax(-1).tolist() == told(DOCUMENTS)


def test_in_less_exact_arithmetic_almost_nothing_changes():
    for dtype, least in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        model = fv.tiny("llama").to(dtype)
        there, back = (answer(model, documents) for documents in (DOCUMENTS, DOCUMENTS[::-1]))
        assert (there - back).abs().max() < least
        assert there.dtype == dtype


def test_the_model_is_afterwards_as_it_was():
    model = fv.tiny("llama")
    before = plain(model, DOCUMENTS)
    answer(model, DOCUMENTS)
    assert torch.equal(plain(model, DOCUMENTS), before)


def test_what_cannot_be_says_so():
    model = fv.tiny("llama")
    with pytest.raises(FoveateError, match="gpt2 model are not rotary"), unordered(fv.tiny("gpt2"), None, DOCUMENTS):
        pass
    with pytest.raises(FoveateError, match="no documents"), unordered(model, PREFIX, []):
        pass
    with pytest.raises(FoveateError, match="give ids of one text"), unordered(model, PREFIX, [torch.ones(2, 3)]):
        pass
    with unordered(model, PREFIX, DOCUMENTS), pytest.raises(FoveateError, match="without the cache"):
        model(QUESTION)
    with (
        unordered(model, PREFIX, DOCUMENTS),
        pytest.raises(FoveateError, match="leave its block first"),
        unordered(model, PREFIX, DOCUMENTS),
    ):
        pass
