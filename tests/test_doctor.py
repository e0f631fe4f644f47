"""The doctor: it says what is here, and it says honestly what is not."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import pytest
import torch

from foveate import doctor
from foveate.cli import main
from foveate.methods import METHODS


def facts(title: str) -> dict[str, str]:
    return next(section.facts for section in doctor.report() if section.title == title)


def test_versions_are_those_installed():
    versions = facts("versions")
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert {"foveate", "transformers", "triton", "ray", "lm-eval", "datasets"} <= versions.keys()


def test_what_is_missing_is_named_with_its_command(monkeypatch):
    def version(name: str) -> str:
        if name == "ray":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert facts("versions")["ray"] == "not installed"
    assert facts("to install for more") == {"ray": "foveate compare --ray: pip install 'foveate[ray]'"}


def test_every_role_has_a_path_and_receiving_policies_are_named():
    paths = facts("paths")
    assert {cls.role for cls in METHODS.all().values()} <= paths.keys()
    assert "h2o" in paths["cache"] and "streaming" not in paths["cache"]


def test_linear_mixers_say_which_kernels_they_take_and_why_not(monkeypatch):
    for reason, said in (
        (None, "flash-linear-attention's, in bfloat16"),
        ("none is here", "plain PyTorch: none is here"),
    ):
        monkeypatch.setattr(doctor.fast, "unavailable", lambda reason=reason: reason)
        assert said in facts("kernels")["linear mixers"]


def test_devices_say_why_there_is_no_gpu():
    devices = facts("devices")
    assert "cores" in devices["cpu"] and "GiB" in devices["memory"]
    assert ("cuda:0" in devices) == torch.cuda.is_available() == ("gpu" not in devices)


def test_files_follow_the_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    files = facts("files")
    assert files["converted models"] == str(tmp_path / "cache") and files["its conversion"] == "not yet made"


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_the_command(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["foveate", "doctor", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr().out
    assert not left.value.code
    if arguments:
        assert json.loads(printed)["versions"]["torch"] == importlib.metadata.version("torch")
    else:
        assert "to install for more" in printed
