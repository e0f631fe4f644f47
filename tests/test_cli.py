"""The commands: what they print, their exit codes, and a sentence for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foveate.cli import main
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.version import __version__

PROGRAM = str(Path(sys.executable).with_name("foveate"))
TASK = "perplexity:tokens=96,window=64,chunk=32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def foveate(monkeypatch, capsys, tmp_path):
    """The program in this process, in an empty folder: its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foveate", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return left.value.code or 0, printed.out, printed.err

    return call


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = "import sys, foveate.cli; print(any(m in sys.modules for m in ('torch', 'transformers', 'altair')))"
    assert subprocess.check_output([sys.executable, "-c", code]) == b"False\n"
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        printed = subprocess.check_output([PROGRAM, "--help"], text=True)
        best = min(best, time.perf_counter() - start)
    assert all(verb in printed for verb in ("compare", "catalog", "doctor", "verify"))
    assert best < 2  # half a second where nothing else runs


def test_version(foveate):
    assert foveate("--version") == (0, f"{__version__}\n", "")


def test_compare_ends_with_table_advice_and_paths(foveate, folder, tmp_path):
    recipes = ["--recipes", "full,window:entries=16,sinks=4", "--recipes", "h2o:entries=16"]
    code, out, err = foveate("compare", folder, *recipes, "--tasks", TASK, "--out", "runs/a")
    assert code == 0
    for words in ("recipe", "perplexity", "window:entries=16,sinks=4", "h2o:entries=16", "the full model"):
        assert words in out
    assert out.splitlines()[-2:] == ["runs/a/report.html", "runs/a/results.jsonl"]
    assert "[3/3]" in err
    lines = [json.loads(line) for line in Path("runs/a/results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok"] * 3
    code, again, err = foveate("compare", folder, *recipes, "--tasks", TASK, "--out", "runs/a")
    assert (code, again) == (0, out) and "3 of 3 cells are finished already" in err and "[" not in err


def test_the_same_command_finds_its_folder_without_out(foveate, folder):
    arguments = ("compare", folder, "--recipes", "full", "--tasks", TASK)
    assert foveate(*arguments)[0] == 0
    (made,) = Path("runs").iterdir()
    assert made.name.startswith("tiny-llama-")
    assert "1 of 1 cells are finished already" in foveate(*arguments)[2]
    assert list(Path("runs").iterdir()) == [made]


def test_without_full_it_says_what_is_lost(foveate, folder):
    code, out, err = foveate("compare", folder, "--recipes", "window:entries=16", "--tasks", TASK)
    assert code == 0 and "full is not among the recipes" in err and "no advice" in out


def test_a_failed_cell_is_exit_code_1(foveate, folder, monkeypatch):
    def broken(self, view):
        raise RuntimeError("a bug in a technique")

    monkeypatch.setattr("foveate.cache.window.Window.score", broken)
    code, out, err = foveate("compare", folder, "--recipes", "full,window:entries=16", "--tasks", TASK)
    assert code == 1
    assert "RuntimeError: a bug in a technique (test_cli.py:" in err and "Traceback" not in err
    assert "failed" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--recipes", "windw:keep=0.2"], "did you mean window"),
        (["--recipes", "window:kep=0.2"], "did you mean keep?"),
        (["--recipes", "window:keep=0"], "outside (0, 1]"),
        (["--recipes", "window:keep=0.2,entries=3"], "keep"),
        (["--recipes", ""], "no recipe was given"),
        (["--tasks", "perplexty"], "did you mean perplexity?"),
        (["--tasks", "perplexity:window=5000,tokens=5000"], "1024 positions"),
        (["--tasks", "perplexity:tokens=9000000,window=64"], "give a longer text"),
        (["--profile", "quikc"], "did you mean quick?"),
        (["--text", "empty.txt"], "is empty"),
        (["--text", "absent.txt"], "there is no text"),
        (["--out", "file"], "is a file"),
        (["--out", "occupied"], "not empty"),
        (["--dtype", "float7"], "float7"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--workers", "-1"], "workers=-1"),
        (["--workers", "2", "--ray", "local"], "exclude each other"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2_with_nothing_half_written(foveate, folder, arguments, sentence):
    Path("empty.txt").touch()
    Path("file").touch()
    Path("occupied").mkdir()
    Path("occupied/thesis.tex").touch()
    before = sorted(Path().rglob("*"))
    given = ["--recipes", "full"] if "--recipes" not in arguments else []
    given += ["--tasks", TASK] if "--tasks" not in arguments else []
    code, out, err = foveate("compare", folder, *given, *arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if not line.startswith("foveate: full is not among")]
    assert line.startswith("foveate: ") and sentence in line
    assert sorted(Path().rglob("*")) == before


def test_no_model_and_other_arguments_are_exit_code_2(foveate, folder):
    Path("nothing").mkdir()
    code, _, err = foveate("compare", "nothing", "--recipes", "full", "--tasks", TASK)
    assert code == 2 and "holds no model" in err and not Path("runs").exists()
    assert foveate("compare", folder, "--recipes", "full", "--tasks", TASK, "--out", "a")[0] == 0
    code, _, err = foveate("compare", folder, "--recipes", "window:entries=9", "--tasks", TASK, "--out", "a")
    assert code == 2 and "was made with recipes full" in err and "--out" in err


def test_typers_own_errors_are_exit_code_2_too(foveate):
    for arguments in (
        ["compare"],
        ["compare", "m", "--nonsense"],
        ["nonsense"],
        ["compare", "m", "--seed", "x"],
    ):
        code, _, err = foveate(*arguments)
        assert code == 2 and "Traceback" not in err and err


def test_catalog(foveate, tmp_path):
    code, out, _ = foveate("catalog")
    assert code == 0 and "h2o" in out and "Heavy-Hitter" in out
    code, out, _ = foveate("catalog", "--json", "--role", "depth")
    entries = json.loads(out)
    assert {entry["role"] for entry in entries} == {"depth"}
    assert entries[0]["paper"]["url"].startswith("https://")
    code, _, err = foveate("catalog", "--role", "dept")
    assert code == 2 and "did you mean depth?" in err


def test_catalog_says_what_was_verified_and_where(foveate):
    from foveate.catalog import catalog, markdown

    Path("docs/claims").mkdir(parents=True)
    Path("docs/claims/h2o.json").write_text(json.dumps({"method": "h2o", "status": "fails"}))
    (entry,) = [entry for entry in catalog() if entry.name == "h2o"]
    assert (entry.verified, entry.where) == ("fails", "docs/claims/h2o.json")
    assert "| fails |" in markdown()
    Path("docs/claims/h2o.json").write_text("{")
    code, _, err = foveate("catalog")
    assert code == 2 and "foveate verify h2o" in err


def test_verify_of_an_unknown_name_is_exit_code_2(foveate):
    code, _, err = foveate("verify", "h3o")
    assert code == 2 and "h2o" in err


# ---- read -----------------------------------------------------------------------------------------------------------

READ = ("--probes", "induction", "--length", "64", "--passages", "1")


def test_read_ends_with_table_summary_and_paths(foveate, folder):
    code, out, err = foveate("read", folder, *READ, "--out", "runs/r")
    assert code == 0
    assert "induction" in out and "No part is clear in any of the 16 heads." in out
    assert out.splitlines()[-2:] == ["runs/r/anatomy.html", "runs/r/reading.json"]
    assert "tokens through the model" in err and "induction: done" in err
    assert {p.name for p in Path("runs/r").iterdir()} == {"anatomy.html", "reading.json"}
    code, again, err = foveate("read", folder, *READ, "--out", "runs/r")
    assert (code, again) == (0, out) and "1 of 1 probes are measured already" in err


def test_read_finds_its_folder_without_out(foveate, folder):
    assert foveate("read", folder, *READ)[0] == 0
    assert Path("runs/tiny-llama-read/reading.json").exists()


def test_a_passage_of_the_readers_own_is_on_the_page(foveate, folder):
    Path("mine.txt").write_text("my own words", encoding="utf-8")
    assert foveate("read", folder, *READ, "--passage", "mine.txt", "--out", "r")[0] == 0
    assert '"tokens": ["m", "y", " ", "o"' in Path("r/anatomy.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--probes", "indction"], "did you mean induction"),
        (["--probes", "induction:last=3"], "has no field 'last'"),
        (["--passage", "absent.txt"], "can't be read"),
        (["--passage", "binary"], "not UTF-8"),
        (["--length", "8"], "at least 16 tokens"),
        (["--passages", "0"], "1 passage or more"),
        (["--text", "absent.txt"], "there is no text"),
        (["--text", "short.txt"], "longer text"),
        (["--out", "file"], "is a file"),
        (["--out", "occupied"], "not empty"),
        (["--dtype", "float7"], "float7"),
        (["--device", "cuda:9"], "cuda:9"),
    ],
)
def test_bad_input_to_read_is_a_sentence_with_nothing_written(foveate, folder, arguments, sentence):
    Path("file").touch()
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("short.txt").write_text("too short a text\n")
    Path("occupied").mkdir()
    Path("occupied/thesis.tex").touch()
    before = sorted(Path().rglob("*"))
    probes = [] if "--probes" in arguments else ["--probes", "induction"]
    # A probe that reads the text itself says that it is too short; the others don't need it.
    if "short.txt" in arguments:
        probes = ["--probes", "layers"]
    code, out, err = foveate("read", folder, *probes, *arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    (line,) = err.splitlines()
    assert line.startswith("foveate: ") and sentence in line
    assert sorted(Path().rglob("*")) == before


def test_an_encoder_is_told_to_be_one(foveate, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    small = BertConfig(vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(small).save_pretrained("bert")
    tiny_tokenizer().save_pretrained("bert")
    code, _, err = foveate("read", "bert", *READ, "--out", "r")
    assert code == 2 and "is an encoder" in err and not Path("r").exists()
