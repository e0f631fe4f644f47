"""The run folder: nothing is lost, nothing is overwritten, nothing is half there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.compare.grid import Cell
from foveate.compare.store import OURS, RunFolder
from foveate.errors import FoveateError

CELLS = [Cell("tiny", recipe, "perplexity", {"seed": 0}) for recipe in ("full", "window:keep=0.5")]
ARGUMENTS = {"model": "tiny", "recipes": ["full", "window:keep=0.5"], "seed": 0}
METRICS = {"perplexity": {"value": 2, "low": 1, "high": 3}}
OK = {"status": "ok", "seconds": 1.0, "metrics": METRICS, "artifacts": {}}
FAILED = {"status": "failed", "reason": "why", "seconds": 1.0, "metrics": {}, "artifacts": {}}


def opened(path: Path, arguments=ARGUMENTS) -> RunFolder:
    return RunFolder(path, arguments)


def test_finished_cells_stay_failed_ones_are_missing(tmp_path):
    with opened(tmp_path / "run") as folder:
        folder.plan(CELLS)
        assert folder.missing() == CELLS
        folder.put(CELLS[1], OK)
        folder.put(CELLS[0], FAILED)
    with opened(tmp_path / "run") as folder:
        folder.plan(CELLS)
        assert folder.missing() == [CELLS[0]]
        assert [record["status"] for record in folder.records()] == ["failed", "ok"]
        folder.put(CELLS[0], OK)
        assert folder.missing() == []


def test_files_are_what_the_contract_says(tmp_path):
    with opened(tmp_path / "run") as folder:
        folder.plan(CELLS)
        folder.put(CELLS[1], OK | {"artifacts": {"curve": {"x": [1]}}})
        folder.put(CELLS[0], FAILED)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["format"] == 1 and run["arguments"] == ARGUMENTS and {"foveate", "created"} <= run.keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [line["recipe"] for line in lines] == ["full", "window:keep=0.5"]
    contract = {"model", "recipe", "task", "metrics", "setting", "status", "seconds"}
    assert lines[0].keys() == contract | {"reason"} and lines[1].keys() == contract
    cell = json.loads((tmp_path / "run" / "cells" / f"{CELLS[1].id}.json").read_text())
    assert cell["id"] == CELLS[1].id and cell["artifacts"] == {"curve": {"x": [1]}}


@pytest.mark.parametrize("content", ["", '{"id": "12', "[]", '{"id": "other", "status": "ok"}'])
def test_a_damaged_cell_is_run_again(tmp_path, content):
    with opened(tmp_path / "run") as folder:
        folder.plan(CELLS)
        folder.put(CELLS[0], OK)
    (tmp_path / "run" / "cells" / f"{CELLS[0].id}.json").write_text(content)
    with opened(tmp_path / "run") as folder:
        folder.plan(CELLS)
        assert CELLS[0] in folder.missing()


def test_unfinished_files_are_swept_out(tmp_path):
    with opened(tmp_path / "run"):
        pass
    leftovers = [tmp_path / "run" / f"{OURS}run.json.tmp", tmp_path / "run" / "cells" / f"{OURS}a.json.tmp"]
    for leftover in leftovers:
        leftover.write_text("{")
    with opened(tmp_path / "run"):
        assert not any(leftover.exists() for leftover in leftovers)


def test_a_folder_whose_making_was_interrupted_is_still_empty(tmp_path):
    (tmp_path / f"{OURS}run.json.tmp").write_text("{")
    with opened(tmp_path) as folder:
        folder.plan(CELLS)


def test_other_arguments_are_refused_by_name(tmp_path):
    with opened(tmp_path / "run"):
        pass
    with pytest.raises(FoveateError, match=r"made with recipes full,window:keep=0.5.*asks for full.*--out"):
        opened(tmp_path / "run", ARGUMENTS | {"recipes": ["full"]})
    with pytest.raises(FoveateError, match="seed 0, but this run asks for 1"):
        opened(tmp_path / "run", ARGUMENTS | {"seed": 1})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FoveateError, match="not empty and no run folder"):
        opened(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1}'])
def test_a_damaged_run_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(FoveateError, match="damaged"):
        opened(tmp_path)


def test_a_run_of_a_later_format_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": 2, "arguments": ARGUMENTS}))
    with pytest.raises(FoveateError, match="format 2"):
        opened(tmp_path)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(FoveateError, match="is a file"):
            opened(path)


def test_a_place_that_cant_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(FoveateError, match="can't be written"):
        opened(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_a_sentence_and_keeps_what_was_there(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    with opened(tmp_path / "run") as folder:
        folder.plan(CELLS)
        folder.put(CELLS[0], OK)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(FoveateError, match="No space left"):
                folder.put(CELLS[1], OK)
    with opened(tmp_path / "run") as folder:
        folder.plan(CELLS)
        assert folder.missing() == [CELLS[1]]


def test_cells_of_other_versions_are_counted_and_not_used(tmp_path):
    with opened(tmp_path / "run") as folder:
        folder.plan([Cell("tiny", "full", "perplexity", {"seed": 0, "foveate": "0.0.1"})])
        folder.put(folder.cells[0], OK)
    with opened(tmp_path / "run") as folder:
        folder.plan(CELLS)
        assert (folder.unused(), folder.missing()) == (1, CELLS)


HOLD = """
import sys, time
from pathlib import Path
from foveate.compare.store import RunFolder
with RunFolder(Path(sys.argv[1]), {"seed": 0}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_dont_share_a_folder_and_a_dead_one_lets_go(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(FoveateError, match="in use"), opened(tmp_path / "run", {"seed": 0}):
        pass
    holder.kill()
    holder.wait()
    with opened(tmp_path / "run", {"seed": 0}):
        pass
