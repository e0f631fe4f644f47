from __future__ import annotations

import pytest

from foveate.data.text import Text
from foveate.errors import FoveateError
from foveate.methods import Recipe
from foveate.tasks import TASKS, passkey
from foveate.tasks.passkey import QUESTION, SENTENCE, Passkey


def test_the_key_stands_at_its_depth_and_the_question_comes_later(bench, monkeypatch):
    texts: list[str] = []
    real = passkey.read

    def spy(model, ids, cache=None, *, last=0):
        if cache is None:
            texts.append("")
        texts[-1] += bench.tokenizer.decode(ids[0])
        return real(model, ids, cache, last=last)

    monkeypatch.setattr(passkey, "read", spy)
    outcome = Passkey(cases=3, tokens=300, chunk=77).run(bench)
    cases = outcome.artifacts["cases"]
    assert len(set(texts)) == len({case["expected"] for case in cases}) == 3
    for text, case in zip(texts, cases, strict=True):
        assert len(text.encode()) == 300 and QUESTION not in text
        sentence = SENTENCE.format(key=case["expected"])
        before, after = text.split(sentence)
        assert len(before) / len(before + after) == pytest.approx(case["depth"], abs=0.01)
        assert len(case["expected"]) == 5
    assert [case["depth"] for case in cases] == pytest.approx([1 / 6, 1 / 2, 5 / 6])


def test_in_chunks_or_whole_is_the_same_to_the_full_cache(bench):
    whole, chunked = (Passkey(cases=2, tokens=200, chunk=chunk).run(bench) for chunk in (None, 64))
    assert whole.artifacts == chunked.artifacts
    assert whole.metrics["cache_fraction"].value == 1


@pytest.mark.parametrize("chunk", [None, 50])
def test_the_budget_holds(bench, chunk):
    task = Passkey(cases=1, tokens=400, chunk=chunk)
    outcome = task.measure(bench, Recipe.of("window:keep=0.25"))
    assert 0.2 < outcome.metrics["cache_fraction"].value < 0.27


def test_an_answer_counts_where_it_starts_with_the_key(bench, monkeypatch):
    def answers(model, ids, cache, count):
        text = next(replies)
        return bench.tokenizer(text, return_tensors="pt").input_ids, cache

    keys = [case["expected"] for case in Passkey(cases=3, tokens=200).run(bench).artifacts["cases"]]
    replies = iter([f" {keys[0]}. ", f" not {keys[1]}", f"\n{keys[2]}"])
    monkeypatch.setattr(passkey, "decode", answers)
    outcome = Passkey(cases=3, tokens=200).run(bench)
    assert [case["ok"] for case in outcome.artifacts["cases"]] == [True, False, True]
    assert outcome.metrics["passkey"].value == pytest.approx(2 / 3)
    assert outcome.metrics["passkey"].low < 2 / 3 < outcome.metrics["passkey"].high


@pytest.mark.parametrize("wrong", ["cases=0", "tokens=100", "digits=0", "digits=17", "chunk=1", "chunk=0"])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(FoveateError, match="at least"):
        TASKS.parse(f"passkey:{wrong}")


def test_what_cannot_run_is_told_before_it_runs(bench):
    with pytest.raises(FoveateError, match="1024 positions"):
        Passkey(tokens=1024).check(bench)
    bench.text = Text("short", "a", "too short")
    with pytest.raises(FoveateError, match="longer text or fewer tokens"):
        Passkey(tokens=512).check(bench)


def test_the_default_model_finds_keys_with_its_full_cache_and_not_without_the_text(smollm2_bench):
    task = Passkey(cases=8, tokens=1024)
    task.check(smollm2_bench)
    assert task.run(smollm2_bench).metrics["passkey"].value >= 7 / 8  # all, where this was written
    outcome = Passkey(cases=1, tokens=1024).measure(smollm2_bench, Recipe.of("streaming:keep=0.1"))
    assert outcome.metrics["passkey"].value == 0
