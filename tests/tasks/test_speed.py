from __future__ import annotations

import pytest
import torch

from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.models.tiny import tiny
from foveate.tasks import TASKS
from foveate.tasks.speed import Speed, _with_same_weights

NAMES = {
    *("prefill_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"),
    *("prefill_speedup", "decode_speedup", "cache_bytes", "cache_fraction"),
    *("peak_memory_bytes", "parameters"),
}
SHORT = Speed(prompt=64, tokens=3, repeats=2)


@pytest.mark.parametrize("recipe", ["full", "streaming:keep=0.25"])
def test_all_metrics_are_there(bench, recipe):
    metrics = SHORT.measure(bench, Recipe.of(recipe)).metrics
    assert set(metrics) == NAMES
    assert all(0 < m.low <= m.value <= m.high for m in metrics.values())


def test_full_is_its_own_baseline(bench):
    metrics = SHORT.measure(bench, Recipe.of("full")).metrics
    for name in ("prefill_speedup", "decode_speedup", "cache_fraction"):
        assert (metrics[name].low, metrics[name].value, metrics[name].high) == (1, 1, 1)


def test_memory_and_parameters_are_those_in_force(bench):
    whole = sum(p.numel() for p in bench.model.parameters())
    full, streaming = (SHORT.measure(bench, Recipe.of(r)).metrics for r in ("full", "streaming:keep=0.1"))
    assert full["parameters"].value == streaming["parameters"].value == whole
    assert full["peak_memory_bytes"].value > 4 * whole + full["cache_bytes"].value
    assert streaming["cache_fraction"].value < 0.2
    with apply(bench.model, "drop-attention:keep=0.5", calibration=torch.arange(1, 65).unsqueeze(0)):
        dropped = SHORT.run(bench).metrics
    assert dropped["parameters"].value < whole
    assert dropped["peak_memory_bytes"].value < full["peak_memory_bytes"].value


@torch.no_grad()
def test_the_baseline_shares_the_weights_and_not_the_recipe(bench):
    ids = torch.arange(1, 41).unsqueeze(0)
    want = bench.model(ids).logits
    twin = _with_same_weights(bench.model)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in bench.model.parameters()}
    with apply(bench.model, "skip-layers:keep=0.5+streaming:entries=8"):
        assert not torch.equal(bench.model(ids).logits, want)
        assert torch.equal(twin(ids).logits, want)
    assert torch.equal(bench.model(ids).logits, want)


def test_a_recipe_that_runs_half_the_layers_is_faster(bench):
    bench.model = tiny("llama", num_hidden_layers=16)
    task = Speed(prompt=256, tokens=8, repeats=5)
    metrics = task.measure(bench, Recipe.of("skip-layers:keep=0.25")).metrics
    assert metrics["prefill_speedup"].value > 1 and metrics["decode_speedup"].value > 1


@pytest.mark.parametrize("wrong", ["prompt=1", "tokens=0", "repeats=0"])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(FoveateError, match="at least"):
        TASKS.parse(f"speed:{wrong}")
