"""Leak: a planted diagonal is found, carries the instructions over, and nothing leaks without it."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.claims import CLAIMS
from foveate.errors import FoveateError
from foveate.models.patching import ablated
from foveate.models.planted import Planted
from foveate.probes import Data, leak
from foveate.probes.leak import Leak, _forced, answered, defended, given_away, instructions, paths
from foveate.tasks.base import Bench

FIXED = ["You are a tall cook.", "You are cook. a tall"]
"""Of one length, so that the repetition always stands as far from the instructions."""


@pytest.fixture(scope="module")
def model():
    """Head 0.1 looks at the byte of the instructions that comes next, and copies it; 0.2 at the one repeated."""
    _, source, again, _ = _forced(FIXED[0], fv.tiny_tokenizer())
    position = ("position", "position")
    return (
        Planted(layers=1)
        .head(0, 1, match=position, shift=source - again + 1, move=("token", "out"))
        .head(0, 2, match=position, shift=source - again)
        .model()
    )


@pytest.fixture
def fixed(monkeypatch):
    monkeypatch.setattr(leak, "instructions", lambda count, seed, part=slice(None): (FIXED * count)[:count])


def test_the_planted_path_is_found_and_leaks(model, fixed):
    reading = Leak(count=2).measure(model, Data.of(model, fv.tiny_tokenizer(), length=64))
    assert [(r.role, r.layer, r.unit) for r in reading.roles] == [("leak path", 0, 1)]
    assert float(reading.scores["leak same"].scores[0, 2]) > 0.9
    assert reading.metrics["given away"].value == 1 and "100%" in reading.summary
    assert reading.metrics["rank correlation of perplexity and what is given away"].value == 0  # all leak alike


def test_without_the_path_nothing_leaks(model):
    tokenizer = fv.tiny_tokenizer()
    assert answered(model, tokenizer, FIXED)[0].startswith(FIXED[0])
    for head, least in (((0, 1), 0.0), ((0, 2), 1.0), ((0, 3), 1.0)):
        with ablated(model, [head]):
            assert given_away(FIXED[0], answered(model, tokenizer, FIXED[:1])[0]) == least


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_paths_are_those_of_eager_attention(family):
    model, tokenizer = fv.tiny(family), fv.tiny_tokenizer()
    asked = instructions(2, 0)
    path = paths(model, tokenizer, asked)
    model.set_attn_implementation("eager")
    after, own = [], []
    for i, text in enumerate(asked):
        ids, source, again, size = _forced(text, tokenizer)
        with torch.no_grad():
            out = model(ids[None], output_attentions=True)
        maps = torch.stack(out.attentions)[:, 0].double()
        begun = len(" You are")
        for k in range(begun - 1, size - 1):
            after.append(maps[:, :, again + k, source + k + 1])
            own.append(maps[:, :, again + k, source + k])
        said = out.logits[0, source - 1 : source + size - 1].double().log_softmax(-1)
        nats = -said.gather(-1, ids[source : source + size, None]).mean()
        assert path.perplexity[i] == pytest.approx(float(nats.exp()), rel=1e-3)
    torch.testing.assert_close(path.next, torch.stack(after).mean(0), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(path.same, torch.stack(own).mean(0), atol=1e-6, rtol=1e-3)


def test_answers_of_a_batch_are_those_of_each_alone():
    model, tokenizer = fv.tiny("llama"), fv.tiny_tokenizer()
    asked = [instructions(4, seed)[0] for seed in range(2)]
    together = answered(model, tokenizer, asked)
    for text, answer in zip(asked, together, strict=True):
        alone = answered(model, tokenizer, [text])[0]
        assert len(alone) > 10 and answer.startswith(alone[:30])


def test_what_is_given_away_is_counted_in_runs_of_words():
    text = "You are a cook. Be kind to all."
    assert given_away(text, text.upper()) == 1 and given_away(text, "You are here") == 0
    assert given_away(text, defended(text, 1)) == 1  # strange signs don't hide it
    assert given_away(text, "all to kind be cook a are you") == 0  # order matters


def test_instructions_come_in_pairs_of_the_same_words():
    made = instructions(8, 3)
    assert all(sorted(a.split()) == sorted(b.split()) and a != b for a, b in zip(made[::2], made[1::2], strict=True))
    assert all(text.startswith("You are") for text in made)
    one, two = (instructions(20, 0, slice(i, None, 2)) for i in (0, 1))
    assert not {w for t in one for w in t.split()} & {"Velden.", "Brigg."} or not set(one) & set(two)


def test_what_cannot_be_measured_gets_a_sentence():
    data = Data.of(fv.tiny("llama"), fv.tiny_tokenizer())
    with pytest.raises(FoveateError, match="2 instructions"):
        Leak(count=1).check(fv.tiny("llama"), data)
    with pytest.raises(FoveateError, match="128 positions"):
        Leak().check(fv.tiny("llama", max_position_embeddings=128), data)


def test_the_claim_runs_on_the_planted_path(model, fixed, monkeypatch):
    monkeypatch.setattr(leak, "CHOSEN", 2)
    monkeypatch.setattr(leak, "JUDGED", 2)
    # Signs would move the repetition away from where the planted head looks.
    monkeypatch.setattr(leak, "defended", lambda text, seed: text[::-1])
    finding = CLAIMS["leak"]().run(Bench(model, fv.tiny_tokenizer(), fv.load_text("prose")))
    assert finding.checks["without the heads of the path less is given away"]
    assert finding.metrics["given away"].value == 1 and not finding.checks["familiar instructions are given away more"]
