"""Mixers compared: cells, what they say, the page."""

import json

import pytest
from typer.testing import CliRunner

from foveate.cli import app
from foveate.compare.mixers import CONTESTS, Row, advice_of, asked_for, compare_mixers, rows_of
from foveate.compare.mixers_report import render
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.train import Settings, Sizes

TASK = "mqar:pairs=1,length=8,vocab=8"
GIVEN = {
    "sizes": Sizes(width=32, heads=2),
    "settings": Settings(steps=3, batch=8),
    "test": 16,
    "device": "cpu",
    "show": False,
}


def run(out=None, mixers=("softmax", "linear"), **more):
    return compare_mixers(list(mixers), [TASK], out=out, **{**GIVEN, **more})


def test_cells_are_kept_and_not_run_again(tmp_path):
    first = run(tmp_path / "run")
    assert [cell["status"] for cell in first.cells] == ["ok", "ok"]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/cells").iterdir()}
    assert len(stamps) == 2 and (tmp_path / "run/report.html").exists()
    again = run(tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert again.cells == first.cells
    with pytest.raises(FoveateError, match="was made with seeds 0"):
        run(tmp_path / "run", seeds=(1,))


def test_seeds_make_one_row_with_their_interval():
    got = run(mixers=["linear"], seeds=(0, 1))
    (row,) = got.rows()
    values = [cell["metrics"]["accuracy"]["value"] for cell in got.cells]
    assert row.quality.value == pytest.approx(sum(values) / 2) and len(got.cells) == 2


def test_the_best_learning_rate_counts():
    got = run(mixers=["linear"], lrs=(1e-9, 3e-2), settings=Settings(steps=60, batch=16))
    assert got.cells[0]["artifacts"]["lr"] == 3e-2


def test_figures_of_state_and_speed():
    soft, linear = run().rows()
    assert soft.memory["y"][1] > 3 * soft.memory["y"][0] and len(set(linear.memory["y"])) == 1
    assert soft.state_bytes == soft.memory["y"][0]
    assert soft.decode_tokens_per_second > 0 and soft.train_tokens_per_second > 0


def test_side_by_side_speeds_are_not_measured(tmp_path):
    got = run(tmp_path / "run", workers=2)
    assert [cell["status"] for cell in got.cells] == ["ok", "ok"], got.failed
    assert got.rows()[0].train_tokens_per_second is None


def test_what_fails_is_a_result():
    got = run(mixers=["linear"], settings=Settings(steps=40, batch=8, lr=1e30), lrs=(1e30,))
    assert "no longer a number" in got.failed[0]["reason"]
    assert got.rows()[0].texts()[0] == "failed" and "no longer a number" in render(got.cells)


def test_advice_names_the_smallest_state_that_comes_near():
    def row(name, value, state):
        return Row(name, "mqar", "accuracy", True, Metric(value, value, value), 10, state)

    rows = [row("softmax", 1.0, 4096), row("far", 0.5, 16), row("based", 0.985, 1024), row("wide", 0.99, 2048)]
    assert advice_of(rows)[0].endswith("based comes near (98.5%) with 1,024.")
    assert "none with less comes near" in advice_of(rows[:2])[0]


def test_losses_are_better_low():
    low, high = (Row(n, "lm", "loss", False, Metric(v, v, v), 1, 10) for n, v in (("a", 1.0), ("b", 2.0)))
    assert advice_of([high, low])[0].startswith("lm: a does best (1.000)")


def test_the_page_says_all_and_lets_nothing_through():
    got = run()
    cells = [dict(cell) for cell in got.cells]
    cells[0]["model"] = "<script>alert(1)</script>"
    page = render(cells)
    assert "<script>alert" not in page and "softmax" in page and "bytes of state" in page
    assert page.count('class="chart ') == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mixers", "softmx"], "did you mean softmax"),
        (["--mixers", "softmax", "--train", "stps=3"], "did you mean steps"),
        (["--mixers", "softmax", "--train", "width=wide"], "give a whole number"),
        (["smollm2-135m", "--mixers", "softmax"], "give no model"),
        (["--train", "width=3"], "compare needs a model"),
        (["--mixers", "softmax", "--text", "code"], "--text says nothing"),
    ],
)
def test_what_cannot_be_is_a_sentence(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code != 0 and said in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_the_command_line_reads_sizes_and_settings():
    got = asked_for(None, None, ["softmax,linear"], None, ["width=32,until=0.5", "lr=1e-3/1e-2,seeds=0/1"], None)
    assert got["sizes"].width == 32 and got["settings"].until == 0.5
    assert got["lrs"] == [1e-3, 1e-2] and got["seeds"] == [0, 1] and got["mixers"] == ["softmax", "linear"]
    assert asked_for(None, None, ["recall"], None, None, None)["out"].as_posix() == "runs/mixers-recall"


def test_contests_can_be_built():
    from dataclasses import replace

    from foveate.train import build
    from foveate.train.tasks import TRAIN_TASKS

    for contest in CONTESTS.values():
        for mixer in contest.mixers:
            for task in contest.tasks:
                build(TRAIN_TASKS.parse(task), replace(contest.sizes, mixer=mixer))


def test_rows_of_failed_and_finished_cells_in_order():
    cells = run().cells
    broken = {**cells[0], "status": "failed", "reason": "why", "metrics": {}, "artifacts": {}}
    assert [row.quality is None for row in rows_of([broken, cells[1]])] == [True, False]
    assert json.dumps(cells)  # plain


def test_types_of_settings_whose_default_is_none():
    got = asked_for(None, None, ["softmax"], None, ["bfloat16=true,until=none"], None)
    assert got["settings"].bfloat16 is True and got["settings"].until is None


def test_another_seed_has_another_folder():
    outs = {asked_for(None, None, ["recall"], None, None, None, seed=seed)["out"] for seed in (0, 1)}
    assert len(outs) == 2


def test_seeds_that_failed_are_told():
    cells = run(mixers=["linear"], seeds=(0, 1)).cells
    broken = {**cells[1], "status": "failed", "reason": "why", "metrics": {}, "artifacts": {}}
    assert rows_of([cells[0], broken])[0].texts()[0].endswith("1 of 2 seeds")
