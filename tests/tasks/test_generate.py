from __future__ import annotations

import pytest
import torch

from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.tasks import TASKS
from foveate.tasks.base import decode, passages
from foveate.tasks.generate import Generate


@pytest.mark.parametrize("recipe", ["full", "streaming:keep=0.25"])
def test_samples_are_greedy_continuations_under_the_recipe(bench, recipe):
    bench.model.generation_config.eos_token_id = None
    outcome = Generate(samples=2, prompt=64, tokens=9).measure(bench, Recipe.of(recipe))
    assert outcome.metrics["tokens"].value == 18
    assert 0 < outcome.metrics["distinct_2"].value <= 1
    with apply(bench.model, recipe):
        for prompt, sample in zip(passages(bench, 2, 64), outcome.artifacts["samples"], strict=True):
            ids, _ = decode(bench.model, prompt, None, 9)
            assert sample["text"] == bench.tokenizer.decode(ids[0], skip_special_tokens=True)
            assert sample["prompt"] == bench.tokenizer.decode(prompt[0])


def test_text_that_goes_in_circles_has_few_distinct_bigrams(bench, monkeypatch):
    circle = torch.tensor([[65, 66] * 5])
    monkeypatch.setattr(bench.model, "generate", lambda ids, **kwargs: torch.cat([ids, circle], dim=1))
    outcome = Generate(samples=1, prompt=16, tokens=10).run(bench)
    assert outcome.metrics["distinct_2"].value == pytest.approx(2 / 9)


def test_a_text_that_ends_at_once_is_a_sample_too(bench, monkeypatch):
    monkeypatch.setattr(bench.model, "generate", lambda ids, **kwargs: ids)
    outcome = Generate(samples=1, prompt=16).run(bench)
    assert outcome.metrics["tokens"].value == 0 and outcome.artifacts["samples"][0]["text"] == ""


def test_passages_are_spread_over_the_text(bench):
    found = passages(bench, 3, 50)
    text = tokens(bench.text.evaluation[: 64 * 3 * 50], bench.tokenizer)
    assert [p.shape for p in found] == [(1, 50)] * 3
    assert torch.equal(found[0], text[:, :50]) and torch.equal(found[-1], text[:, -50:])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("wrong", ["samples=0", "prompt=1", "tokens=0"])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(FoveateError, match="at least"):
        TASKS.parse(f"generate:{wrong}")
