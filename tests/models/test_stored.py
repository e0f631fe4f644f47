"""What is measured once a model is kept, and made anew where the file is damaged."""

from __future__ import annotations

import torch

import foveate as fv
from foveate.models.stored import fingerprint, stored


def test_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    model, made = fv.tiny("llama"), []

    def make():
        made.append(1)
        scores = torch.tensor([[0.5, 0.25]])
        return {"scores": scores, "again": scores}  # two names for the same numbers

    for _ in range(2):
        assert stored(model, "test", "1", make)["scores"].tolist() == [[0.5, 0.25]]
    assert len(made) == 1
    stored(model, "test", "2", make)
    assert len(made) == 2
    files = list((tmp_path / "measured").glob("*.safetensors"))
    assert len(files) == 2 and not list((tmp_path / "measured").glob("*.part"))
    for path in files:
        path.write_bytes(b"half a file")
    assert stored(model, "test", "1", make)["scores"].tolist() == [[0.5, 0.25]]
    assert len(made) == 3


def test_a_model_has_one_fingerprint_in_any_dtype():
    model = fv.tiny("llama")
    before = fingerprint(model)
    assert before == fingerprint(fv.tiny("llama").bfloat16()) != fingerprint(fv.tiny("qwen2"))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert fingerprint(model) != before
