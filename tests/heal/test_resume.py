"""Stopped at any time, healing goes on to the same weights; another run's folder is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import foveate as fv
from foveate.errors import FoveateError
from foveate.heal import heal

SPEC = "distill:tokens=10k,batch=4,length=32,data=samples,samples=2k,lr=1e-3"
RUN = """
import sys, torch, foveate as fv
from foveate.heal import heal
torch.set_num_threads(1)
teacher, student = fv.tiny("llama", num_hidden_layers=2), fv.tiny("llama", num_hidden_layers=2, seed=1)
print("start", flush=True)
report = heal(student, teacher, sys.argv[2], work=sys.argv[1], every=0, progress=False)
torch.save({k: v for k, v in student.state_dict().items()}, sys.argv[1] + "/done.pt")
"""


def models():
    return fv.tiny("llama", num_hidden_layers=2), fv.tiny("llama", num_hidden_layers=2, seed=1)


def same(student, again):
    return all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_killed_and_gone_on_gives_the_same_weights(tmp_path):
    torch.set_num_threads(1)
    teacher, student = models()
    whole = heal(student, teacher, SPEC, progress=False)
    killed = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), SPEC], stdout=subprocess.PIPE)
    until = time.monotonic() + 100
    while not any(tmp_path.glob("checkpoint-*")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "done.pt").exists()
    kept = sorted(tmp_path.glob("checkpoint-*"))[-1]
    assert 0 < json.loads((kept / "state.json").read_text())["step"] < 79
    teacher, again = models()
    report = heal(again, teacher, SPEC, work=tmp_path, progress=False)
    assert report.curve == whole.curve and report.tokens == whole.tokens
    assert same(student, again)


@pytest.mark.parametrize("way", ["lora:rank=4,", "minilm:"])
def test_stopped_and_gone_on_gives_the_same_weights(tmp_path, way):
    torch.set_num_threads(1)
    spec = SPEC.replace("distill:", way)

    def stop(done):
        if 0.5 < done < 1 and any(tmp_path.glob("checkpoint-*")):
            raise KeyboardInterrupt

    teacher, student = models()
    heal(student, teacher, spec, progress=False)
    teacher, again = models()
    with pytest.raises(KeyboardInterrupt):
        heal(again, teacher, spec, work=tmp_path, every=0, progress=stop)
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear  # no adapter is left on it
    teacher, again = models()
    heal(again, teacher, spec, work=tmp_path, progress=False)
    assert same(student, again)


def test_a_finished_run_is_not_run_again_and_samples_are_kept(tmp_path):
    teacher, student = models()
    spec = SPEC.replace("10k", "2k")
    heal(student, teacher, spec, work=tmp_path, progress=False)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").iterdir()}
    teacher, again = models()
    told = []
    heal(again, teacher, spec, work=tmp_path, progress=told.append)
    assert told[-1] == 1.0 and len(told) <= len(stamps) + 1
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").iterdir()}
    assert same(student, again)
    assert all(len(load_file(path)["ids"]) == 16 for path in sorted(stamps)[:-1])
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))


def test_another_run_is_refused(tmp_path):
    teacher, student = models()
    spec = SPEC.replace("10k", "1k")
    heal(student, teacher, spec, work=tmp_path, progress=False)
    teacher, student = models()
    with pytest.raises(FoveateError, match="another run .spec distill.* instead of distill.*lr=0.0005"):
        heal(student, teacher, spec.replace("1e-3", "5e-4"), work=tmp_path, progress=False)
    other = fv.tiny("llama", num_hidden_layers=2, seed=7)
    with pytest.raises(FoveateError, match="another run .student"):
        heal(other, teacher, spec, work=tmp_path, progress=False)
    with pytest.raises(FoveateError, match="samples of another run"):
        heal(student, fv.tiny("llama", num_hidden_layers=2, seed=8), spec, work=tmp_path, progress=False)


def test_a_broken_checkpoint_is_a_sentence(tmp_path):
    teacher, student = models()
    spec = SPEC.replace("10k", "1k")
    heal(student, teacher, spec, work=tmp_path, progress=False)
    (kept,) = tmp_path.glob("checkpoint-*")
    path = Path(kept, "weights.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    teacher, student = models()
    with pytest.raises(FoveateError, match="can't be read .*: delete it"):
        heal(student, teacher, spec, work=tmp_path, progress=False)


@pytest.mark.parametrize("module", ["train.checkpoint", "heal.text"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_gets_a_sentence_and_leaves_nothing_half_written(module, error, tmp_path, monkeypatch):
    def full(tensors, path, **more):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(sys.modules[f"foveate.{module}"], "save_file", full)
    teacher, student = models()
    with pytest.raises(FoveateError, match="can't be written .*No space left on device.*: make room there"):
        heal(student, teacher, SPEC, work=tmp_path / "work", every=0, progress=False)
    left = [p for p in (tmp_path / "work").rglob("*") if p.is_file() and "samples" not in p.parts]
    assert not left and not list((tmp_path / "work").rglob(".0*"))
