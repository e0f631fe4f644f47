"""Reweaving against a slow reference in float64, training, files, and their errors."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.methods import apply
from foveate.steer import ResidualView
from foveate.steer import reweave as module_file
from foveate.steer.reweave import RecallOverDistance, Reweaving, reweave_module, train_reweave

IDS = torch.randint(3, 120, (2, 30), generator=torch.Generator().manual_seed(1))


def reference(module, hidden, captured, valid):
    """Token by token, in float64: what the docstring of `Reweaving` says."""
    module = module.double()
    out = hidden.double().clone()
    for row in range(len(hidden)):
        total = torch.zeros(module.key.out_features, module.value.out_features, dtype=torch.float64)
        weight = torch.zeros(module.key.out_features, dtype=torch.float64)
        for t in range(hidden.shape[1]):
            states = [norm(captured[i][row, t].double()) for norm, i in zip(module.norms, module.layers, strict=True)]
            u, x = torch.cat(states), hidden[row, t].double()
            if valid[row, t]:
                key = torch.nn.functional.elu(module.key(u)) + 1
                total, weight = total + torch.outer(key, module.value(u)), weight + key
            query = torch.nn.functional.elu(module.query(module.query_norm(x))) + 1
            if weight.any():
                out[row, t] = x + module.gate * module.out(total.T @ query / (weight @ query))
    return out


@torch.no_grad()
def test_the_module_is_what_its_formulas_say(monkeypatch):
    monkeypatch.setattr(module_file, "CHUNK", 4)
    module = Reweaving(8, [0, 2], 2, rank=5)
    torch.nn.init.normal_(module.gate)
    hidden, first = torch.randn(2, 11, 8), torch.randn(2, 11, 8)
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[1, :3] = False
    state, pieces = {}, []
    for piece in (slice(0, 5), slice(5, 6), slice(6, 11)):
        captured = {0: first[:, piece], 2: hidden[:, piece]}
        pieces.append(module(ResidualView(2, hidden[:, piece], captured, valid[:, piece], state)))
    expected = reference(module, hidden, {0: first, 2: hidden}, valid)
    torch.testing.assert_close(torch.cat(pieces, 1)[valid].double(), expected[valid], atol=1e-5, rtol=1e-5)
    assert state["reweave"].shape == (2, 5, 5) and state["weight"].shape == (2, 5, 1)


def test_training_changes_the_module_only_unless_asked():
    model = fv.tiny("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    module = reweave_module(model)
    losses = train_reweave(model, module, [(IDS, IDS)] * 30)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert bool(module.gate.any())
    train_reweave(model, module, [(IDS, IDS)] * 2, whole=True)
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_a_saved_module_steers_as_the_one_that_was_trained(tmp_path):
    model = fv.tiny("gpt2")
    module = reweave_module(model, layers=[1, 3], at=3, rank=7)
    torch.nn.init.normal_(module.gate)
    module.save(tmp_path / "m.safetensors")
    with torch.no_grad(), module_file.reweaving(model, module):
        direct = model(IDS).logits
    with apply(model, f"reweave:weights={tmp_path}/m.safetensors"):
        assert torch.equal(model(IDS).logits, direct)
    assert Reweaving.load(tmp_path / "m.safetensors").layers == [1, 3]


def test_errors_are_sentences(tmp_path):
    model = fv.tiny("llama")
    with pytest.raises(FoveateError, match="needs a trained module"), apply(model, "reweave"):
        pass
    with pytest.raises(FoveateError, match="no trained module"), apply(model, "reweave:weights=nowhere.safetensors"):
        pass
    (tmp_path / "no.safetensors").write_bytes(b"nothing of the sort")
    with (
        pytest.raises(FoveateError, match="no trained module"),
        apply(model, f"reweave:weights={tmp_path}/no.safetensors"),
    ):
        pass
    Reweaving(32, [0], 1).save(tmp_path / "narrow.safetensors")
    with (
        pytest.raises(FoveateError, match="hidden size of 32"),
        apply(model, f"reweave:weights={tmp_path}/narrow.safetensors"),
    ):
        pass
    Reweaving(64, [0, 3], 2).save(tmp_path / "ahead.safetensors")
    with pytest.raises(FoveateError, match="up to 2"), apply(model, f"reweave:weights={tmp_path}/ahead.safetensors"):
        pass


def test_the_claim_runs_and_its_arms_are_of_one_size(monkeypatch):
    monkeypatch.setattr(RecallOverDistance, "seeds", 1)
    monkeypatch.setattr(RecallOverDistance, "marks", (1, 2))
    bench = fv.Bench(fv.tiny("llama"), fv.tiny_tokenizer(), fv.load_text("prose"))
    finding = RecallOverDistance().run(bench)
    assert len(finding.checks) == 5
    assert abs(finding.metrics["parameters, reweaving over wider MLP"].value - 1) < 0.01
