"""Head scores: against attention made eagerly, and the sum that integrated gradients promise."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.data.needles import WORDINGS, Needle, needles
from foveate.errors import FoveateError
from foveate.models.anatomy import anatomy
from foveate.scores import gate_scores, retrieval_scores
from foveate.tasks import passkey

MODEL = fv.tiny("llama").double()
PARTS = anatomy(MODEL)


def case(seed=0, length=40):
    text = torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(seed))
    return Needle(text, 10, 14, text[:, 6:10], text[:, 10:14])


def test_retrieval_scores_are_those_of_eager_attention():
    model = fv.tiny("llama")
    cases = [case(0), case(1), case(2)]
    expected = torch.zeros(len(PARTS.layers), PARTS.heads)
    model.set_attn_implementation("eager")
    for c in cases:
        ids = torch.cat([c.text, c.question, c.answer], 1)
        with torch.no_grad():
            maps = model(ids, output_attentions=True).attentions
        for layer, weights in enumerate(maps):
            for head in range(PARTS.heads):
                for i in range(4):
                    at = c.text.shape[1] + c.question.shape[1] - 1 + i
                    best = int(weights[0, head, at].argmax())
                    expected[layer, head] += 10 <= best < 14 and int(ids[0, best]) == int(c.answer[0, i])
    model.set_attn_implementation("sdpa")
    ours = retrieval_scores(model, cases)
    assert ours.kind == "head"
    torch.testing.assert_close(ours.scores, expected / 12)


def log_probability(c, recipe):
    """Of the answer, when only what the recipe keeps of the text is there."""
    with torch.no_grad(), fv.apply(MODEL, recipe):
        cache = MODEL(c.text, use_cache=True).past_key_values
        follow = torch.cat([c.question, c.answer], 1)
        logits = MODEL(follow, past_key_values=cache, use_cache=True).logits[0, -5:-1].log_softmax(-1)
    return float(logits.gather(-1, c.answer[0][:, None]).sum())


def test_gate_scores_add_up_to_what_the_far_past_is_worth():
    c = case()
    raw = gate_scores(MODEL, [c], window=8, steps=40)
    assert raw.kind == "kv_head" and raw.scores.shape == (len(PARTS.layers), PARTS.kv_heads)
    from foveate.scores.gates import _integrated

    follow = torch.cat([c.question, c.answer], 1)
    total = float(_integrated(MODEL, c.text, follow, 4, window=8, sinks=4, steps=40).sum())
    worth = log_probability(c, "full") - log_probability(c, "window:entries=12,sinks=4")
    assert total == pytest.approx(worth, rel=1e-3)
    assert float(raw.scores.abs().sum()) == pytest.approx(1)


def test_the_model_is_left_as_it_was():
    before = [p.requires_grad for p in MODEL.parameters()]
    gate_scores(MODEL, [case()], window=8, steps=1)
    assert [p.requires_grad for p in MODEL.parameters()] == before
    assert all(p.grad is None for p in MODEL.parameters())


def test_needles_ask_in_other_words_than_the_task_that_judges():
    judged = passkey.SENTENCE + passkey.QUESTION
    assert not any(word in judged for _, question in WORDINGS for word in [question])
    assert not any("pass key" in sentence + question for sentence, question in WORDINGS)


def test_needles_say_when_the_text_is_too_short():
    with pytest.raises(FoveateError, match="longer text"):
        needles(torch.arange(20)[None], fv.tiny_tokenizer(), cases=1, length=64)


def test_needles_hold_the_answer_where_they_say():
    tokenizer = fv.tiny_tokenizer()
    for c in needles(torch.randint(3, 100, (1, 400)), tokenizer, cases=8, length=120):
        assert c.text.shape == (1, 120)
        assert torch.equal(c.text[:, c.start : c.end], c.answer)
        assert len("".join(tokenizer.decode(c.answer[0]).split())) >= 5


def test_heads_of_layers_with_a_window_are_scored_by_places_in_the_text():
    model = fv.tiny("gemma3_text", sliding_window=64)
    cases = [Needle(t, 100, 104, t[:, 96:100], t[:, 100:104]) for t in (case(i, 128).text for i in range(20))]
    expected = torch.zeros(4, 4)
    model.set_attn_implementation("eager")
    for c in cases:
        ids = torch.cat([c.text, c.question, c.answer], 1)
        with torch.no_grad():
            maps = model(ids, output_attentions=True, use_cache=False).attentions
        for layer, weights in enumerate(maps):
            for i in range(4):
                best = weights[0, :, c.text.shape[1] + c.question.shape[1] - 1 + i].argmax(-1)
                same = ids[0, best] == c.answer[0, i]
                expected[layer] += ((best >= 100) & (best < 104) & same).float()
    model.set_attn_implementation("sdpa")
    assert expected.sum() > 0
    torch.testing.assert_close(retrieval_scores(model, cases).scores, expected / 80)
