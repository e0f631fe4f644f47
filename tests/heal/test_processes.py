"""Two processes heal as one does, with the same batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import foveate as fv
from foveate.heal import heal
from foveate.methods import changed
from foveate.models.surgery import Surgery, cut, settle

COMMON = "tokens=2k,batch=8,length=32,data=samples,lr=1e-3"
RUNS = {
    "distill": ("hidden", f"distill:{COMMON}"),
    "lora": ("channel", f"lora:rank=2,pieces=2,{COMMON}"),
    "shared": ("recursive", f"distill:{COMMON}"),
}
SCRIPT = """
import sys, torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from test_processes import RUNS, models
from foveate.heal import heal
from foveate.train import processes
torch.set_num_threads(1)
for name, (kind, spec) in RUNS.items():
    teacher, student = models(kind)
    heal(student, teacher, spec, work=f"{sys.argv[2]}/{name}", every=0)
    weights = {k: v.clone() for k, v in student.state_dict().items()}
    save_file(weights, f"{sys.argv[2]}/{name}-{processes.rank()}.safetensors")
"""


def models(kind):
    teacher = fv.tiny("llama", num_hidden_layers=3, tie_word_embeddings=True)
    student = fv.tiny("llama", num_hidden_layers=3, tie_word_embeddings=True, seed=1)
    if kind == "recursive":  # one weight that three depths read
        return teacher, changed(student, "recursive:loops=3,rank=2", calibration=torch.arange(1, 65)[None])[0]
    cut(student, "channel", [torch.arange(64 + 16 * i) for i in range(3)], Surgery())
    if kind == "hidden":
        cut(student, "hidden", [torch.arange(48)], Surgery())
    settle(student)
    return teacher, student


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes made, and what they told."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "run.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(folder / "run.py"), str(Path(__file__).parent), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stderr


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_heal_as_one(two, name):
    torch.set_num_threads(1)
    folder, told = two
    kind, spec = RUNS[name]
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
    teacher, student = models(kind)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    heal(student, teacher, spec, progress=False)
    moved = 0.0
    for key, p in student.state_dict().items():
        torch.testing.assert_close(first[key], p, rtol=1e-3, atol=2e-4)
        assert torch.equal(first[key], second[key])
        moved = max(moved, float((p - before[key]).abs().max()))
    assert moved > 2e-3  # far beyond the tolerance
    assert told.count("heal: train 100%, 2,048 tokens") == len(RUNS)  # one process tells
    assert len(list((folder / name).glob("checkpoint-*"))) == 1


def test_one_process_goes_on_with_what_two_began(two):
    folder, _ = two
    kind, spec = RUNS["distill"]
    teacher, student = models(kind)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    heal(student, teacher, spec, work=folder / "distill", progress=False)  # finds it finished
    first = load_file(folder / "distill-0.safetensors")
    assert all(torch.equal(p, first[name]) for name, p in student.state_dict().items())
