"""The training loop: what it learns, that it goes on exactly, and that several processes do what one does."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import foveate as fv
from foveate.errors import FoveateError
from foveate.train import Settings, Sizes, build, fit
from foveate.train.tasks import TRAIN_TASKS

TASK = TRAIN_TASKS.parse("mqar:pairs=2,length=16,vocab=16")
SETTINGS = Settings(steps=60, batch=8, lr=3e-3)
SMALL = Sizes(width=32, heads=2, conv=3)

RUN = """
import sys, torch
from pathlib import Path
from foveate.train import Settings, Sizes, build, fit
from foveate.train.tasks import TRAIN_TASKS
torch.set_num_threads(1)
sizes = Sizes(width=32, heads=2, conv=3)
model = build(TRAIN_TASKS.parse("mqar:pairs=2,length=16,vocab=16"), sizes)
fit(model, TRAIN_TASKS.parse("mqar:pairs=2,length=16,vocab=16"), Settings(steps=60, batch=8, lr=3e-3),
    work=Path(sys.argv[1]), every=0, told=lambda *_: __import__("time").sleep(0.05))
Path(sys.argv[1], "done").touch()
"""

TWO = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from foveate.train import Settings, Sizes, build, fit
from foveate.train import processes
from foveate.train.tasks import TRAIN_TASKS
torch.set_num_threads(1)
processes.join(torch.device("cpu"))
for way in ("ddp", "fsdp"):
    task = TRAIN_TASKS.parse("mqar:pairs=2,length=16,vocab=16")
    model = build(task, Sizes(width=32, heads=2, conv=3))
    fit(model, task, Settings(steps=20, batch=8, lr=3e-3), parallel=way, work=Path(sys.argv[1], way), every=0)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(weights, f"{sys.argv[1]}/{way}-{processes.rank()}.safetensors")
"""


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns():
    model = build(TASK, SMALL)
    told = []
    report = fit(model, TASK, Settings(steps=120, batch=16, lr=5e-3), told=lambda step, f: told.append((step, f)))
    assert report.steps == len(report.losses) == 120
    assert sum(report.losses[-10:]) < 0.8 * sum(report.losses[:10])
    assert report.tokens_per_second > 0 and not model.training
    assert told[-1][0] == 120 and set(told[-1][1]) == {"loss", "lr", "tokens_per_second"}


def test_until_stops_it():
    report = fit(build(TASK, SMALL), TASK, Settings(steps=100, batch=8, until=0.0))
    assert report.steps == 5 and report.judged[0][0] == 5


@pytest.mark.parametrize("mixer", ["softmax", "linear"])
def test_killed_and_gone_on_gives_the_same_losses(tmp_path, mixer):
    torch.set_num_threads(1)
    whole_model = build(TASK, SMALL)
    whole = fit(whole_model, TASK, SETTINGS)
    if mixer == "softmax":
        killed = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)])
        until = time.monotonic() + 100
        while not any(tmp_path.glob("checkpoint-*")) and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert not (tmp_path / "done").exists()
        kept = sorted(tmp_path.glob("checkpoint-*"))[-1]
        assert 0 < json.loads((kept / "state.json").read_text())["step"] < 60
        again = build(TASK, SMALL)
        report = fit(again, TASK, SETTINGS, work=tmp_path)
        assert report.losses == whole.losses and same(again, whole_model)
        return
    # Stopped from within, at a step that is none of a look.
    sizes = Sizes(width=32, heads=2, mixer=mixer)
    first, again = build(TASK, sizes), build(TASK, sizes)
    whole = fit(first, TASK, SETTINGS)

    def stop(step, figures):
        if step >= 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(again, TASK, SETTINGS, work=tmp_path, every=0, told=stop)
    report = fit(build(TASK, sizes), TASK, SETTINGS, work=tmp_path)
    assert report.losses == whole.losses


def test_buffers_are_kept_with_the_weights(tmp_path):
    model = build(TASK, SMALL)
    model.register_buffer("counted", torch.zeros(3))
    model.counted += 7
    fit(model, TASK, Settings(steps=1, batch=8), work=tmp_path)
    again = build(TASK, SMALL)
    again.register_buffer("counted", torch.zeros(3))
    fit(again, TASK, Settings(steps=1, batch=8), work=tmp_path)
    assert again.counted.tolist() == [7, 7, 7]


def test_another_runs_checkpoint_is_refused(tmp_path):
    fit(build(TASK, SMALL), TASK, Settings(steps=1, batch=8), work=tmp_path)
    with pytest.raises(FoveateError, match="checkpoint of another run"):
        fit(build(TASK, SMALL), TASK, Settings(steps=2, batch=8), work=tmp_path)


def test_in_pieces_the_losses_are_the_same():
    reports = [fit(build(TASK, SMALL), TASK, Settings(steps=4, batch=8, pieces=pieces)).losses for pieces in (1, 4)]
    assert reports[0] == pytest.approx(reports[1], abs=1e-5)


def test_a_loss_that_is_no_number_is_a_sentence():
    model = build(TASK, SMALL)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(FoveateError, match="no longer a number"):
        fit(model, TASK, Settings(steps=2, batch=8))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "at least 1"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"lr": 0.0}, "lr and clip above 0"),
        ({"warmup": 1.0}, "warmup must be"),
    ],
)
def test_settings_that_cannot_be_are_sentences(given, said):
    with pytest.raises(FoveateError, match=said):
        Settings(**given)


def test_a_batch_that_cannot_be_shared_out_is_a_sentence():
    with pytest.raises(FoveateError, match="give a multiple of 3"):
        fit(build(TASK, SMALL), TASK, Settings(batch=8, pieces=3))


def test_norms_and_biases_do_not_decay():
    from foveate.train.loop import _optimizer

    model = build(TASK, SMALL)
    groups = _optimizer(model, Settings(decay=0.3)).param_groups
    assert {p.ndim >= 2 for p in groups[0]["params"]} == {True} and groups[0]["weight_decay"] == 0.3
    assert {p.ndim < 2 for p in groups[1]["params"]} == {True} and groups[1]["weight_decay"] == 0
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_two_processes_train_as_one(tmp_path):
    torch.set_num_threads(1)
    (tmp_path / "run.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = build(TASK, SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = fit(model, TASK, Settings(steps=20, batch=8, lr=3e-3))
    for way in ("ddp", "fsdp"):
        first, second = (load_file(tmp_path / f"{way}-{rank}.safetensors") for rank in (0, 1))
        for key, value in model.state_dict().items():
            if key not in first:  # tied
                continue
            assert torch.equal(first[key], second[key])
            torch.testing.assert_close(first[key], value, rtol=1e-3, atol=3e-4)
        state = json.loads((next(Path(tmp_path, way).glob("checkpoint-*")) / "state.json").read_text())
        assert state["losses"] == pytest.approx(report.losses, abs=1e-3)
    assert max(float((value - before[key]).abs().max()) for key, value in model.state_dict().items()) > 5e-3


def test_until_is_remembered(tmp_path):
    settings = Settings(steps=100, batch=8, until=0.0)
    first = fit(build(TASK, SMALL), TASK, settings, work=tmp_path)
    again = fit(build(TASK, SMALL), TASK, settings, work=tmp_path)
    assert again.steps == first.steps == 5 and again.judged == first.judged and again.losses == first.losses


@pytest.mark.parametrize("sizes", [Sizes(width=64, heads=2, conv=3), Sizes(width=32, heads=2, conv=3, mixer="linear")])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, sizes):
    fit(build(TASK, SMALL), TASK, Settings(steps=1, batch=8), work=tmp_path)
    with pytest.raises(FoveateError, match="checkpoint of another run .*model"):
        fit(build(TASK, sizes), TASK, Settings(steps=1, batch=8), work=tmp_path)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_command_with_two_processes_ends_with_a_model(tmp_path, way):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "foveate"]
    asked = ["train", str(TASK), "--width", "32", "--heads", "2", "--steps", "40", "--batch", "8", "--device", "cpu"]
    more = ["--mixer", "routing", "--until", "0.99", "--parallel", way, "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, *asked, *more], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("accuracy, unseen") == 1
    again = fv.train(
        TASK,
        "routing",
        sizes=Sizes(width=32, heads=2),
        settings=Settings(steps=40, batch=8, until=0.99),
        out=tmp_path / "run",
        device="cpu",
        show=False,
    )
    assert again.report.steps == 40
    assert again.metrics["loss"].value == pytest.approx(TASK.judge(again.model)["loss"].value, abs=1e-5)
