from __future__ import annotations

import random

import pytest
import torch

from foveate.errors import FoveateError
from foveate.methods import Recipe
from foveate.tasks import TASKS
from foveate.tasks.copying import FIRST, NOUNS, Copy, _listed, _permuted


def test_nouns_are_single_words_without_repetition():
    assert len(NOUNS) == len(set(NOUNS)) >= 100 and all(noun.isalpha() for noun in NOUNS)


def test_a_permuted_list_keeps_the_nouns_but_no_neighbours():
    nouns = list(NOUNS[:8])
    order = _permuted(nouns, random.Random(0))
    assert sorted(order) == sorted(nouns)
    assert not set(zip(order, order[1:], strict=False)) & set(zip(nouns, nouns[1:], strict=False))
    assert _permuted(["a", "b"], random.Random(0)) == ["b", "a"]


@torch.no_grad()
def test_only_the_nouns_are_scored(bench):
    nouns = ["apple", "river", "ink"]
    value, _ = _listed(bench.model, bench.tokenizer, FIRST, nouns, None)
    text = f"{FIRST} apple, river, ink."
    ids = bench.tokenizer(text, return_tensors="pt").input_ids
    logs = bench.model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    start = len(FIRST)
    scored = [i for i in range(start, len(text)) if text[i] not in ",."]
    assert value == pytest.approx(-float(logs[[i - 1 for i in scored]].mean()), rel=1e-4)


def test_it_reports_three_ratios_and_the_cache(bench):
    outcome = Copy(cases=2, nouns=3, gap=100).run(bench)
    ratios = [name for name in outcome.metrics if name.startswith("copy_surprisal_ratio")]
    assert len(ratios) == 3 and all(outcome.metrics[name].low > 0 for name in ratios)
    assert outcome.metrics["cache_fraction"].value == 1


def test_the_three_lists_start_from_the_same_cache(bench):
    """With one list after the other on one cache, the cache would grow by three lists."""
    seen = Copy(cases=1, nouns=3, gap=100).measure(bench, Recipe.of("streaming:entries=40")).metrics
    assert seen["copy_surprisal_ratio"] != seen["copy_surprisal_ratio_permuted"]
    full = Copy(cases=1, nouns=3, gap=100).run(bench).metrics
    assert seen["cache_bytes"].value < full["cache_bytes"].value / 2


@pytest.mark.parametrize("wrong", ["cases=0", "nouns=1", "nouns=99", "gap=0"])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(FoveateError, match="must be|at least"):
        TASKS.parse(f"copy:{wrong}")


def test_the_default_model_remembers_words_and_their_order(smollm2_bench):
    metrics = Copy(cases=2, gap=128).run(smollm2_bench).metrics
    repeated, permuted, novel = (metrics[f"copy_surprisal_ratio{name}"].value for name in ("", "_permuted", "_novel"))
    assert repeated < 0.4 < permuted < 0.85 < novel
