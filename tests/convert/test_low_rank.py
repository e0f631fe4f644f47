"""Low rank: the factors are the best there are on the calibration text, and cost what `keep` says."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.convert.low_rank import basis, in_passages, input_root, paying
from foveate.convert.maps import linear_maps
from foveate.errors import FoveateError
from foveate.methods import apply
from foveate.models.surgery import layer_parameters
from foveate.models.tiny import tiny

IDS = torch.randint(3, 120, (1, 200), generator=torch.Generator().manual_seed(1))


def inputs_of(model, path):
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0].flatten(0, -2).double()


def whitened(weight, x, rank):
    """The published recipe, step by step, in float64: Cholesky factor, SVD of W S, truncation, S inverse."""
    root = torch.linalg.cholesky(x.T @ x)
    left, values, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    return left[:, :rank] @ values[:rank].diag() @ right[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_factors_are_those_of_the_whitened_svd(family):
    model = tiny(family)
    before = {each.path: (each.weight.clone(), each) for each in linear_maps(fv.anatomy(model), "all", "test")}
    xs = {path: inputs_of(model, path) for path in before}
    with apply(model, "low-rank:keep=0.5", calibration=IDS):
        for path, (weight, _) in before.items():
            new = model.get_submodule(path)
            ours = new.up.weight.double() @ new.down.weight.double()
            best = whitened(weight, xs[path], new.rank)
            lost, least = ((xs[path] @ (w - weight.double()).T).norm() for w in (ours, best))
            assert lost < 1.001 * least + 1e-6
            left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            plain = left[:, : new.rank] @ values[: new.rank].diag() @ right[: new.rank]
            assert lost < 0.999 * (xs[path] @ (plain - weight.double()).T).norm()
            torch.testing.assert_close(ours, best, atol=2e-3, rtol=1e-2)


def test_without_calibration_it_is_the_truncated_svd():
    model = tiny("llama")
    weight = model.model.layers[1].mlp.down_proj.weight.detach().double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    with apply(model, "low-rank:keep=0.5,aware=false"):  # no calibration is given, and none is asked for
        new = model.model.layers[1].mlp.down_proj
        ours = new.up.weight.double() @ new.down.weight.double()
    rank = new.rank
    torch.testing.assert_close(ours, left[:, :rank] @ values[:rank].diag() @ right[:rank], atol=1e-5, rtol=1e-4)


def test_only_the_layers_that_are_named_are_converted():
    model = tiny("llama")
    with apply(
        model, "low-rank:keep=0.5,maps=mlp,layers=0/2-3+low-rank:keep=0.5,maps=attention,layers=1", calibration=IDS
    ):
        kinds = {each: [type(model.get_submodule(f"model.layers.{i}.{each}")).__name__ for i in range(4)]
                 for each in ("mlp.up_proj", "self_attn.q_proj")}  # fmt: skip
    assert kinds["mlp.up_proj"] == ["LowRankLinear", "Linear", "LowRankLinear", "LowRankLinear"]
    assert kinds["self_attn.q_proj"] == ["Linear", "LowRankLinear", "Linear", "Linear"]
    with (
        pytest.raises(fv.FoveateError, match="layers=4 can't be read for 4 layers"),
        apply(model, "low-rank:keep=0.5,layers=4"),
    ):
        pass


def test_a_long_text_is_read_in_passages():
    ids = torch.arange(2100)[None]
    assert torch.equal(in_passages(ids), ids[:, :2048].view(4, 512))
    assert in_passages(ids[:, :1000]).shape == (1, 1000)
    assert in_passages(ids.view(2, 1050)).shape == (2, 1050)
    with pytest.raises(fv.FoveateError, match="tokens=0 is below 1"):
        fv.methods.METHODS.parse("low-rank:keep=0.5,tokens=0")


def test_fewer_tokens_than_directions_still_give_a_map():
    model = tiny("llama")
    with apply(model, "low-rank:keep=0.6", calibration=IDS[:, :9]):
        assert torch.isfinite(model(IDS).logits).all()
    weight = torch.randn(12, 8)
    assert torch.linalg.matrix_rank(input_root(torch.randn(9, 64))) == 64
    vectors, energy = basis(weight)
    assert vectors.shape == (12, paying(weight)) == (12, 4)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4), atol=1e-5, rtol=1e-5)
    assert (energy.diff() <= 0).all() and energy.sum() < 1


@pytest.mark.parametrize("budget", ["uniform", "global", "per-kind", "uniform(floor=0.2)"])
@pytest.mark.parametrize("keep", [0.4, 0.8])
def test_the_parameters_that_stay_are_what_keep_says(budget, keep):
    model = tiny("llama", hidden_size=128, intermediate_size=256)
    norms = 4 * 2 * 128
    whole = layer_parameters(model) - norms
    with apply(model, f"low-rank:keep={keep},budget={budget}", calibration=IDS):
        assert abs((layer_parameters(model) - norms) / whole - keep) < 0.02


def test_a_map_of_low_rank_is_found_and_nothing_is_lost():
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for module in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                thin = torch.randn(module.out_features, 5) @ torch.randn(5, module.in_features) / 20
                module.weight.copy_(thin)
    full = model(IDS).logits
    with apply(model, "low-rank:keep=0.25,maps=mlp", calibration=IDS):
        torch.testing.assert_close(model(IDS).logits, full, atol=1e-3, rtol=1e-3)
        assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)


def test_global_gives_ranks_where_the_energy_is():
    model = tiny("llama")
    with torch.no_grad():
        flat = torch.linalg.qr(torch.randn(128, 64))[0]  # all directions alike: ranks buy little
        model.model.layers[2].mlp.up_proj.weight.copy_(flat)
        model.model.layers[1].mlp.up_proj.weight.copy_(flat * 0.5 ** torch.arange(64))
    with apply(model, "low-rank:keep=0.5,maps=mlp,aware=false,budget=global"):
        up = [layer.mlp.up_proj for layer in model.model.layers]
        ranks = [getattr(module, "rank", paying(torch.empty(128, 64))) for module in up]
    assert ranks[1] < min(ranks[0], ranks[3])


def test_wrong_requests_are_sentences():
    model = tiny("llama")
    for text, words in (
        ("low-rank:keep=0", "outside"),
        ("low-rank:keep=0.5,maps=heads", "no choice"),
        ("low-rank:keep=0.5,aware=false+low-rank:keep=0.5,aware=false", "already"),
        ("recursive:rank=2+low-rank:keep=0.5,aware=false", "already"),
    ):
        with pytest.raises(FoveateError, match=words), apply(model, text):
            pass


@pytest.mark.parametrize("kind", ["flap", "drop"])
def test_converted_maps_are_not_cut_silently(kind):
    from foveate.models.surgery import cut, undone

    model = tiny("llama")
    logits = model(IDS).logits
    with apply(model, "low-rank:keep=0.5,aware=false"), undone(model) as surgery:
        if kind == "flap":
            for units, count in (("channel", 100), ("kv_head", 1), ("hidden", 40)):
                keep = [torch.arange(count)] * (1 if units == "hidden" else 4)
                with pytest.raises(FoveateError, match="can't be cut"):
                    cut(model, units, keep, surgery)
        else:
            cut(model, "mlp", [torch.arange(int(i != 1)) for i in range(4)], surgery)
            assert torch.isfinite(model(IDS).logits).all()
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize("budget", ["uniform(floor=0.5)", "global(floor=0.5)"])
def test_a_keep_that_a_budget_can_not_reach_is_said(budget):
    asked = fv.apply(fv.tiny("llama"), f"low-rank:keep=0.1,aware=false,budget={budget}")
    with pytest.raises(FoveateError, match="was asked for"), asked:
        pass
