"""What tests of runs share: a tiny model on disk, and a plug-in method that misbehaves as it is told."""

from __future__ import annotations

import sys

import pytest

from foveate.methods import METHODS, load_rooms
from foveate.models.tiny import tiny, tiny_tokenizer

PLUGIN = """
import os, signal, time
from contextlib import contextmanager
from pathlib import Path

import torch

from foveate.errors import FoveateError
from foveate.methods import Method, method


@method("mischief")
class Mischief(Method):
    role = "test"
    claim = "it does what it is told"

    how: str
    file: str = ""

    @contextmanager
    def applied(self, target):
        if self.how == "raise":
            raise TypeError("no such\\nthing")
        if self.how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.how == "sentence":
            raise FoveateError("this can't be done: do that.")
        if self.how in ("SIGINT", "SIGTERM") and not Path(self.file).exists():  # once
            Path(self.file).touch()
            signal.raise_signal(signal.Signals[self.how])
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "wait":  # until the file is there
            Path(self.file + f".{time.time_ns()}.{os.getpid()}").touch()
            while not Path(self.file).exists():
                time.sleep(0.02)
        weight = next(target.model.parameters())
        if self.how == "wreck":  # and leave it so
            weight.data.zero_()
            raise ValueError("wrecked")
        before = weight.data.clone()
        if self.how == "overflow":
            weight.data.fill_(torch.nan)
        yield
        weight.data.copy_(before)
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The method `mischief`, installed as a plug-in is: here, in child processes, and in commands."""
    home = tmp_path / "site"
    (home / "mischief-1.dist-info").mkdir(parents=True)
    (home / "mischief-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mischief\nVersion: 1\n")
    (home / "mischief-1.dist-info" / "entry_points.txt").write_text("[foveate.methods]\nmischief = mischief_plugin\n")
    (home / "mischief_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(home)
    monkeypatch.setenv("PYTHONPATH", str(home))
    load_rooms.cache_clear()
    yield home
    load_rooms.cache_clear()
    METHODS._classes.pop("mischief", None)
    sys.modules.pop("mischief_plugin", None)
