"""Runs: a failure does not end them, being stopped loses nothing finished, and bad input starts none."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from foveate.compare import Comparison, Interrupted, compare, runner, workers
from foveate.compare.grid import Cell
from foveate.compare.progress import Estimate
from foveate.errors import FoveateError
from foveate.models.tiny import tiny, tiny_tokenizer

TASK = "perplexity:tokens=96,window=64,chunk=32"


@pytest.fixture
def model():
    return tiny("llama")


def here(model, recipes, **more):
    return compare(model, recipes, [TASK], tokenizer=tiny_tokenizer(), show=False, **more)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# ---- in this process ---------------------------------------------------------------------------------------


@pytest.fixture
def no_page(monkeypatch):
    """The page takes seconds; it has its own tests."""
    monkeypatch.setattr(Comparison, "report", lambda self, path: Path(path).touch())


def test_a_live_model_is_compared_and_left_as_it_was(model, tmp_path):
    ids = torch.arange(1, 30)[None]
    before = model(ids).logits
    done = here(model, ["full", "window:entries=16"], out=tmp_path / "run")
    assert [cell["status"] for cell in done.cells] == ["ok", "ok"] and done.failed == []
    assert torch.equal(model(ids).logits, before)
    assert [line["recipe"] for line in lines(tmp_path / "run")] == ["full", "window:entries=16"]
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    assert done.table().row_count == 2 and done.advice()


def test_without_a_folder_nothing_is_written_but_the_report_asked_for(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = here(model, ["full"])
    assert list(tmp_path.iterdir()) == [] and done.out is None
    assert done.report("page.html").exists()


def test_finished_cells_are_not_run_again(model, tmp_path, monkeypatch, no_page):
    first = here(model, ["full"], out=tmp_path / "run")
    monkeypatch.setattr(runner, "in_this_process", lambda *_: pytest.fail("a finished cell was run again"))
    assert here(model, ["full"], out=tmp_path / "run").cells == first.cells


def test_other_weights_under_the_same_name_are_run(model, tmp_path, no_page):
    first = here(model, ["full"], out=tmp_path / "run")
    second = here(tiny("llama", seed=1), ["full"], out=tmp_path / "run")
    assert first.cells[0]["metrics"] != second.cells[0]["metrics"] and len(lines(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("how", "reason", "traced"),
    [
        ("raise", r"TypeError: no such thing \(mischief_plugin.py:\d+\)", True),
        ("memory", "out of memory: CUDA out of memory.", True),
        ("sentence", "this can't be done: do that.", False),
        ("overflow", "perplexity came out as nan.*", False),
    ],
)
def test_a_failing_cell_is_recorded_and_the_rest_goes_on(model, tmp_path, plugin, how, reason, traced, no_page):
    done = here(model, [f"mischief:how={how}", "full"], out=tmp_path / "run")
    bad, good = done.cells
    assert (bad["status"], good["status"], done.failed) == ("failed", "ok", [bad])
    assert bad["metrics"] == {}
    assert re.fullmatch(reason, bad["reason"])
    assert ("traceback" in bad) == traced
    assert "traceback" not in lines(tmp_path / "run")[0]


def test_failed_cells_are_tried_again(model, tmp_path, plugin, monkeypatch, no_page):
    recipes = ["mischief:how=raise", "full"]
    here(model, recipes, out=tmp_path / "run")
    import mischief_plugin

    monkeypatch.setattr(mischief_plugin, "TypeError", FoveateError, raising=False)
    assert here(model, recipes, out=tmp_path / "run").failed[0]["reason"] == "no such\nthing"


def test_what_a_bug_left_of_the_model_harms_no_other_cell(folder, plugin):
    alone = compare(folder, ["full"], [TASK], show=False).cells[0]["metrics"]
    bad, after = compare(folder, ["mischief:how=wreck", "full"], [TASK], show=False).cells
    assert bad["status"] == "failed" and after["metrics"] == alone


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_keeps_what_is_finished_and_goes_on(model, tmp_path, plugin, no_page, how):
    recipes = ["full", f"mischief:how={how},file={tmp_path / 'once'}", "window:entries=16"]
    with pytest.raises(Interrupted, match="stopped with 1 of 3 cells finished") as stopped:
        here(model, recipes, out=tmp_path / "run")
    assert (stopped.value.finished, stopped.value.cells) == (1, 3)
    assert len(lines(tmp_path / "run")) == 1 and (tmp_path / "run" / "report.html").exists()
    done = here(model, recipes, out=tmp_path / "run")
    assert len(done.cells) == 3 and done.failed == []


def test_bad_input_starts_nothing(model, tmp_path, no_page):
    def refused(match, recipes=("full",), tasks=(TASK,), model=model, **more):
        with pytest.raises(FoveateError, match=match):
            compare(model, recipes, tasks, out=tmp_path / "run", tokenizer=tiny_tokenizer(), show=False, **more)
        assert not (tmp_path / "run").exists()

    refused("did you mean window", recipes=["windw:keep=0.2"])
    refused("outside", recipes=["window:keep=1.5"])
    refused("positions of this model", tasks=["perplexity:window=100000,tokens=100000"])
    refused("the task needs", tasks=["perplexity:tokens=10000000,window=64"])
    refused("no task called", tasks=["perplexty"])
    refused("no text", text="/nowhere/at/all.txt")
    refused("did you mean quick", profile="quikc")
    refused("exclude each other", workers=1, ray="local")
    refused("live model", workers=1)
    refused("workers=-1", workers=-1)
    refused("holds no model", model=tmp_path)
    refused("eval", model=tiny("llama").train())


# ---- child processes ---------------------------------------------------------------------------------------


def test_a_worker_that_dies_costs_one_cell(folder, plugin, tmp_path, no_page):
    recipes = ["mischief:how=kill", "mischief:how=raise", "full"]
    done = compare(folder, recipes, [TASK], out=tmp_path / "run", workers=2, show=False)
    assert [cell["status"] for cell in done.cells] == ["failed", "failed", "ok"]
    assert "SIGKILL" in done.cells[0]["reason"] and "memory" in done.cells[0]["reason"]
    assert "TypeError" in done.cells[1]["reason"]
    here = compare(folder, ["full"], [TASK], show=False)
    assert done.cells[2]["metrics"] == here.cells[0]["metrics"]


@pytest.mark.parametrize(
    ("end", "code", "said"), [(os._exit, 3, "exit code 3"), (signal.raise_signal, signal.SIGSEGV, "SIGSEGV")]
)
def test_how_a_worker_died_is_said(end, code, said):
    process = multiprocessing.get_context("spawn").Process(target=end, args=(code,))
    process.start()
    pipe, _ = multiprocessing.Pipe()
    result = workers._died(workers._Child(process, pipe, Cell("tiny", "full", TASK, {}), time.perf_counter()))
    assert said in result["reason"] and "without workers" in result["reason"]


# ---- commands ----------------------------------------------------------------------------------------------


def start(folder, out, file, *more) -> subprocess.Popen:
    recipes = f"full,mischief:how=wait,file={file},window:entries=16"
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("foveate")), "compare", str(folder)]
        + ["--recipes", recipes, "--tasks", TASK, "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(pattern: Path, process: subprocess.Popen) -> int:
    """Wait until a process has left the file PATTERN.time.pid, and give that pid."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        for path in pattern.parent.glob(f"{pattern.name}.*"):
            path.unlink()
            return int(path.suffix[1:])
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_command_goes_on_after_ctrl_c_and_after_kill_9(folder, plugin, tmp_path):
    out, file = tmp_path / "run", tmp_path / "go"
    for number in (signal.SIGINT, signal.SIGKILL):
        process = start(folder, out, file)
        wait_for(file, process)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        assert [line["recipe"] for line in lines(out)] == ["full"]
        if number != signal.SIGKILL:
            assert process.returncode == 130
            assert "stopped with 1 of 3 cells finished" in said and "Traceback" not in said
            assert (out / "report.html").exists()
    file.touch()
    process = start(folder, out, file)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "1 of 3 cells are finished already" in said and "[3/3]" in said
    assert len(lines(out)) == 3 and str(out / "report.html") in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_leave_with_their_parent(folder, plugin, tmp_path, number):
    process = start(folder, tmp_path / "run", tmp_path / "go", "--workers", "1")
    child = wait_for(tmp_path / "go", process)
    assert child != process.pid
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert gone(child)
    assert "Traceback" not in said
    assert process.returncode == (130 if number == signal.SIGINT else -9)


# ---- the estimate ------------------------------------------------------------------------------------------


def test_the_estimate_learns_each_tasks_speed():
    now = [0.0]
    reading = [Cell("tiny", recipe, "perplexity:tokens=1000", {}) for recipe in "abc"]
    cells = [*reading, Cell("tiny", "a", "perplexity:tokens=3000", {})]
    estimate = Estimate(cells, cost=lambda cell: float(cell.task.partition("=")[2]), lanes=1, clock=lambda: now[0])
    assert estimate.seconds_left() is None and estimate.done == 0
    estimate.started(reading[0])
    now[0] = 5.0
    estimate.progressed(reading[0], 0.5)
    assert estimate.seconds_left() == pytest.approx(5 + 10 + 10 + 30)
    now[0] = 20.0
    estimate.finished(reading[0], 20.0)
    assert estimate.seconds_left() == pytest.approx(20 + 20 + 60)
    assert estimate.done == pytest.approx(1 / 6)
    estimate.finished(reading[1], 0.1, ok=False)
    assert estimate.seconds_left() == pytest.approx(20 + 60)
