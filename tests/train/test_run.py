"""`train`: a folder that goes on, ends whole, and belongs to one run."""

import json

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

import foveate as fv
from foveate.cli import app
from foveate.errors import FoveateError
from foveate.train import Settings, Sizes

TASK = "mqar:pairs=1,length=8,vocab=8"
FEW = Settings(steps=4, batch=8)


def run(out=None, **more):
    given = {"sizes": Sizes(width=32, heads=2), "settings": FEW, "test": 16, "device": "cpu", "show": False}
    return fv.train(TASK, out=out, **{**given, **more})


def test_it_ends_with_a_model_that_opens_again(tmp_path):
    out = tmp_path / "run"
    got = run(out)
    assert sorted(each.name for each in out.iterdir() if each.name != ".lock") == [
        "model",
        "result.json",
        "training.json",
    ]
    model = type(got.model).from_pretrained(out / "model")
    ids = torch.ones(1, 5, dtype=torch.long)
    assert torch.equal(model(ids).logits, got.model(ids).logits)
    assert json.loads((out / "result.json").read_text())["report"]["steps"] == 4


def test_a_finished_run_is_opened_and_not_trained_again(tmp_path):
    first = run(tmp_path / "run")
    stamp = (tmp_path / "run/result.json").stat().st_mtime_ns
    again = run(tmp_path / "run")
    assert again.report == first.report and again.metrics == first.metrics
    assert (tmp_path / "run/result.json").stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_stopped_it_goes_on(tmp_path):
    torch.set_num_threads(1)
    whole = run(settings=Settings(steps=80, batch=8))

    def stop(done):
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", settings=Settings(steps=80, batch=8), every=0, show=stop)
    assert not (tmp_path / "run/result.json").exists()
    again = run(tmp_path / "run", settings=Settings(steps=80, batch=8))
    assert again.report.losses == whole.report.losses and again.metrics == whole.metrics
    assert not (tmp_path / "run/work").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sizes": Sizes(width=64, heads=2)}, "was made with width 32, but this run asks for 64"),
        ({"mixer": "linear"}, "was made with mixer softmax"),
        ({"settings": Settings(steps=5, batch=8)}, "was made with steps 4"),
    ],
)
def test_another_runs_folder_is_refused(tmp_path, more, said):
    run(tmp_path / "run")
    with pytest.raises(FoveateError, match=said):
        run(tmp_path / "run", **more)


def test_folders_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(FoveateError, match=r"holds letter.txt, and is no folder of a training"):
        run(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(FoveateError, match="can't be a run's folder"):
        run(tmp_path / "file")
    run(tmp_path / "run")
    with FileLock(tmp_path / "run/.lock"), pytest.raises(FoveateError, match="in use by another process"):
        run(tmp_path / "run")
    (tmp_path / "run/training.json").write_text("{")
    with pytest.raises(FoveateError, match="damaged"):
        run(tmp_path / "run")


def test_what_cannot_be_built_leaves_nothing(tmp_path):
    with pytest.raises(FoveateError, match="heads don't divide"):
        run(tmp_path / "run", sizes=Sizes(width=32, heads=5))
    with pytest.raises(FoveateError, match="no training task called 'mqr'"):
        fv.train("mqr", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_figures_go_to_a_tracker(tmp_path, monkeypatch):
    from accelerate import tracking

    told = []

    class Noted(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only = "noted", True, False

        def __init__(self, run_name, logging_dir, **kwargs):
            super().__init__()
            told.append(logging_dir)

        tracker = None

        def store_init_configuration(self, values):
            told.append(values["width"])

        def log(self, values, step=None, **kwargs):
            told.append((step, sorted(values)))

        def finish(self):
            told.append("end")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "noted", Noted)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["noted"])
    run(tmp_path / "run", tracker="noted")
    assert told[:2] == [str(tmp_path / "run"), 32] and told[-1] == "end"
    assert told[-3:-1] == [(4, ["loss", "lr", "tokens_per_second"]), (4, ["accuracy", "loss"])]
    with pytest.raises(FoveateError, match="no tracker called 'tensorbord': did you mean tensorboard"):
        run(tracker="tensorbord")
    with pytest.raises(FoveateError, match="needs its package"):
        run(tracker="wandb")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(
        app, ["train", TASK, "--mixer", "linear", "--width", "32", "--steps", "2", "--batch", "8", "--device", "cpu"]
    )
    assert said.exit_code == 0, said.output
    assert "accuracy, unseen" in said.output and "runs/mqar-linear-" in said.output
    (made,) = (tmp_path / "runs").iterdir()
    assert (made / "model/config.json").exists()


def test_a_text_that_is_too_short_for_a_part_is_told_before_anything_is_written(tmp_path):
    (tmp_path / "one.txt").write_text("word " * 400)
    with pytest.raises(FoveateError, match="a part of the text has"):
        fv.train(f"lm:text={tmp_path / 'one.txt'},length=1000", out=tmp_path / "run", device="cpu", show=False)
    assert not (tmp_path / "run").exists()


def test_what_a_kill_left_of_the_first_file_is_no_strange_file(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.training.json.123").write_text("{")
    assert run(tmp_path / "run").report.steps == 4
