"""Select and copy: a planted head that looks at the right option is found, and chooses; nothing else does."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.claims import CLAIMS
from foveate.errors import FoveateError
from foveate.methods import UnitScores
from foveate.models.planted import Planted
from foveate.probes import Data
from foveate.probes import select_and_copy as module
from foveate.probes.select_and_copy import (
    Question,
    SelectAndCopy,
    best_heads,
    choose,
    clearly,
    hear,
    laid_out,
    questions,
)
from foveate.tasks.base import Bench

TEXT = 'Question: Which of the options corresponds to "{answer}"?'
ENDINGS = ["boat", "lamp", "ring", "coin", "door", "leaf", "milk", "wool", "bell", "cake"]
"""Words most of which end in another letter: what the planted head goes by."""


@pytest.fixture(scope="module")
def model():
    """Head 0.2 reads the asked word's last letter, 0.1 notes each token's predecessor, 1.3 looks where these agree."""
    tokenizer = fv.tiny_tokenizer()
    ids, ends, _ = laid_out(fv.tiny("llama"), tokenizer, TEXT.format(answer="lamp"), ENDINGS[:4])
    asked = len(tokenizer(TEXT.format(answer="lamp"), add_special_tokens=False).input_ids) - 3
    assert tokenizer.decode(ids[asked]) == "p" and all(tokenizer.decode(ids[end]) == "\n" for end in ends)
    return (
        Planted(layers=2)
        .previous(0, 1)
        .head(0, 2, match=("position", "position"), shift=asked - (len(ids) - 1), move=("token", "out"))
        .head(1, 3, match=("out", "previous"))
        .model()
    )


@pytest.fixture
def asking(monkeypatch):
    monkeypatch.setattr(module, "WORDINGS", (TEXT,))
    monkeypatch.setattr(module, "WORDS", ENDINGS)


def test_the_head_that_looks_at_the_right_option_is_found(model, asking):
    reading = SelectAndCopy().measure(model, Data.of(model, fv.tiny_tokenizer()))
    assert reading.of_role("select-and-copy") == [(1, 3)] and len(reading.roles) == 1
    judged, letters = list(reading.metrics.values())[:2]
    assert judged.low > 0.7 and letters.high < 0.7 and "1.3" in reading.summary
    assert reading.scores["select-and-copy"].scores[0, 2] == 0.25  # it looks at the question, and guesses


def test_it_chooses_where_the_letter_does_not(model, asking):
    for right in range(4):
        options = ["lamp" if i == right else ENDINGS[4 + i] for i in range(4)]
        choice = choose(model, TEXT.format(answer="lamp"), options, tokenizer=fv.tiny_tokenizer(), heads=[(1, 3)])
        assert choice.option == right and choice.heads == [(1, 3)]
    scores = UnitScores("head", torch.zeros(2, 4).index_put((torch.tensor([1]), torch.tensor([3])), torch.tensor(1.0)))
    assert choose(model, "Q", ["a", "b"], tokenizer=fv.tiny_tokenizer(), heads=scores).heads == [(1, 3)]
    assert best_heads(model, fv.tiny_tokenizer()) == [(1, 3)]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_what_is_heard_is_what_eager_attention_and_the_maps_say(family):
    model, tokenizer = fv.tiny(family), fv.tiny_tokenizer()
    asked = questions(3, 0, module.WORDS) + [Question("A longer one?", ("yes", "no", "maybe", "never"), 0)]
    heard = hear(model, tokenizer, asked)
    model.set_attn_implementation("eager")
    q_proj = {}
    if family == "llama":
        attention = model.model.layers[2].self_attn
        attention.q_proj.register_forward_hook(lambda m, a, out: q_proj.update(q=out))
        attention.k_proj.register_forward_hook(lambda m, a, out: q_proj.update(k=out))
    for i, question in enumerate(asked):
        ids, ends, letters = laid_out(model, tokenizer, question.text, question.options)
        with torch.no_grad():
            out = model(ids[None], output_attentions=True)
        for layer, weights in enumerate(out.attentions):
            torch.testing.assert_close(heard.attention[i, layer], weights[0, :, -1, ends], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heard.letters[i], out.logits[0, -1, letters], atol=1e-4, rtol=1e-4)
        if q_proj:  # head 1 of layer 2 is served by KV head 0
            q, k = q_proj["q"][0, -1, 16:32], q_proj["k"][0, ends, :16]
            torch.testing.assert_close(heard.qk[i, 2, 1], k @ q, atol=1e-5, rtol=1e-4)


def test_every_place_is_right_equally_often():
    made = questions(48, 3, module.WORDS)
    assert [sum(q.right == place for q in made) for place in range(4)] == [12] * 4
    assert all(q.options[q.right] in q.text and len(set(q.options)) == 4 for q in made)


def test_the_bound_is_that_of_the_binomial():
    assert clearly(4, 0.5, 1) == 5  # even four of four happen by chance, 1 in 16
    assert clearly(8, 0.5, 1) == 8  # 1 in 256; seven or eight: 9 in 256


@pytest.mark.parametrize(
    "given,says",
    [
        ({"options": ["one"]}, "2 to 26"),
        ({"options": ["one", " "]}, "none empty"),
        ({"options": ["a", "b"], "heads": [(9, 0)]}, "no head 9.0"),
        ({"options": ["a", "b"], "heads": []}, "empty list"),
        ({"options": ["a", "b" * 2000]}, "positions"),
    ],
)
def test_what_cannot_be_asked_gets_a_sentence(given, says):
    with pytest.raises(FoveateError, match=says):
        choose(fv.tiny("llama"), "Which?", tokenizer=fv.tiny_tokenizer(), **given)


def test_a_probe_of_one_option_gets_a_sentence():
    model = fv.tiny("llama")
    with pytest.raises(FoveateError, match="2 to 26 options"):
        SelectAndCopy(options=1).check(model, Data.of(model, fv.tiny_tokenizer()))


@pytest.mark.parametrize("name", ["select-and-copy", "choose"])
def test_the_claims_run(name, monkeypatch):
    monkeypatch.setattr(module, "TRIED", 6)
    monkeypatch.setattr(module, "JUDGED", 12)
    finding = CLAIMS[name]().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), fv.load_text("prose")))
    assert not all(finding.checks.values())  # of random weights, none holds
