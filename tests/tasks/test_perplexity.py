from __future__ import annotations

import math

import pytest
import torch

from foveate.data.text import Text, tokens
from foveate.errors import FoveateError
from foveate.methods import Recipe
from foveate.models.tiny import tiny
from foveate.tasks import TASKS
from foveate.tasks.base import surprisal
from foveate.tasks.perplexity import Perplexity


@torch.no_grad()
def reference(bench, length):
    """Surprisal in nats of the tokens 1, 2, ... in one forward: (length - 1,)."""
    ids = tokens(bench.text.evaluation, bench.tokenizer, length)
    return surprisal(bench.model(ids).logits[:, :-1], ids[:, 1:])[0]


@pytest.mark.parametrize("chunk", [2, 16, 33, 99, 100, 128])
def test_streaming_in_chunks_equals_one_forward(bench, chunk):
    outcome = Perplexity(tokens=100, window=64, chunk=chunk).run(bench)
    assert math.log(outcome.metrics["perplexity"].value) == pytest.approx(float(reference(bench, 100).mean()), abs=1e-4)
    assert sum(outcome.artifacts["blocks"]["tokens"]) == 99
    assert outcome.artifacts["curve"]["x"][-1] == 100
    assert outcome.metrics["cache_fraction"].value == 1


@pytest.mark.parametrize("skip", [0, 1, 5, 16, 17, 40, 98])
def test_skipped_tokens_are_not_scored(bench, skip):
    outcome = Perplexity(tokens=100, chunk=16, window=64, skip=skip).run(bench)
    scored = reference(bench, 100)[max(skip, 1) - 1 :]
    assert sum(outcome.artifacts["blocks"]["tokens"]) == len(scored)
    assert sum(outcome.artifacts["blocks"]["nll"]) == pytest.approx(float(scored.sum()), rel=1e-4)


def test_keep_is_a_fraction_of_the_window(bench):
    outcome = Perplexity(tokens=200, window=80, chunk=20).measure(bench, Recipe.of("streaming:keep=0.25"))
    assert outcome.metrics["cache_fraction"].value == pytest.approx(20 / 200, rel=0.1)  # and its bookkeeping


def test_progress_ends_at_1(bench):
    seen = []
    bench.progress = seen.append
    Perplexity(tokens=100, chunk=30).run(bench)
    assert seen == sorted(seen) and seen[-1] == 1


@pytest.mark.parametrize("wrong", ["tokens=1", "chunk=0", "window=1", "skip=-1", "tokens=10,skip=9"])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(FoveateError, match="must be"):
        TASKS.parse(f"perplexity:{wrong}")


def test_what_cannot_run_is_told_before_it_runs(bench):
    with pytest.raises(FoveateError, match="longer than the 1024 positions"):
        Perplexity(window=2048).check(bench)
    Perplexity(tokens=4096, window=1024).check(bench)  # rotary: some policies go beyond the positions
    bench.model = tiny("gpt2")
    with pytest.raises(FoveateError, match="ask for tokens=1024"):
        Perplexity(tokens=4096, window=1024).check(bench)
    bench.text = Text("short", "a", "too short")
    with pytest.raises(FoveateError, match="longer text or fewer tokens"):
        Perplexity(tokens=100, window=64).check(bench)
