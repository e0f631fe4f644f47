"""The benchmark of mixers, at tiny sizes on a CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "mixers.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_mixers", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_measures(benchmark, tmp_path, capsys):
    place = tmp_path / "found.json"
    names = ["softmax", "lightning"]
    what = ["growth", "layer", "throughput", "decode"]
    found = benchmark.main([*what, "--smoke", "--mixers", *names, "--json", str(place)])
    assert json.loads(place.read_text()) == json.loads(json.dumps(found))
    assert [row["mixer"] for row in found["growth"]] == names
    assert all(row["lengths"] == [64, 128, 256] and not row["stopped"] for row in found["growth"])
    assert found["growth"][0]["memory_exponent"] > found["growth"][1]["memory_exponent"] - 0.5
    assert [row["mixer"] for row in found["layer"]] == ["lightning"]  # softmax has no recurrence
    assert found["layer"][0]["ratio"]["value"] > 0.5
    (row,) = found["throughput"]
    assert row["backbone"]["parameters"] == row["llama"]["parameters"] and row["ratio"]["value"] > 0
    softmax, lightning = found["decode"]
    assert softmax["bytes"][1] > softmax["bytes"][0] and lightning["bytes"][1] == lightning["bytes"][0]
    printed = capsys.readouterr().out
    assert "time ~ n^" in printed and "tokens/s" in printed


def test_what_runs_out_of_memory_or_fails_is_told_and_the_rest_runs(benchmark, monkeypatch):
    def there_and_back(layer, x, weights, args):
        if x.shape[1] == 256:
            raise torch.OutOfMemoryError("no more")
        raise ValueError("broken\nmore")

    monkeypatch.setattr(benchmark, "there_and_back", there_and_back)
    found = benchmark.main(["growth", "--smoke", "--mixers", "softmax", "linear"])
    assert [row["stopped"] for row in found["growth"]] == ["ValueError: broken"] * 2
    found = benchmark.main(["growth", "--smoke", "--mixers", "softmax", "--lengths", "256"])
    assert found["growth"][0]["stopped"] == "out of memory"


def test_what_is_too_late_is_left_out(benchmark, capsys):
    what = ["growth", "layer", "throughput", "decode"]
    found = benchmark.main([*what, "--smoke", "--mixers", "linear", "--minutes", "-1"])
    assert all(found[each] == [] for each in what)
    assert capsys.readouterr().out.count("left out") == 4


def test_exponents_are_those_of_powers(benchmark):
    lengths = [64 << i for i in range(6)]
    row = {"lengths": lengths, "seconds": [[1e-9 * n**2] * 3 for n in lengths], "bytes": [3 * n for n in lengths]}
    found = benchmark.exponents(row)
    assert found["time_exponent"]["value"] == pytest.approx(2) and found["memory_exponent"] == pytest.approx(1)
