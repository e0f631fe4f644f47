"""Statistics against plain reckoning: what was read is kept here as it is, and reckoned again in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from foveate.methods import apply
from foveate.models.anatomy import anatomy
from foveate.models.surgery import cut, undone
from foveate.models.tiny import TINY_FAMILIES, tiny
from foveate.prune.statistics import column_norms, column_scores, inputs_of, means_of, norm_outputs, sublayer_change

IDS = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_inputs_are_what_the_maps_read(family):
    model = tiny(family).double()
    parts, seen, hooks = anatomy(model), {}, []
    for layer in parts.layers:
        for role in ("o", "down"):
            hooks.append(
                getattr(layer, role).register_forward_pre_hook(
                    lambda m, args, key=(layer.index, role): seen.update(
                        {key: args[0].reshape(48, -1).detach().numpy()}
                    )
                )
            )
    model(IDS)
    for hook in hooks:
        hook.remove()
    found, means = inputs_of(model, IDS), means_of(model, IDS)
    assert found.keys() == seen.keys() == means.keys()
    for key, x in seen.items():
        np.testing.assert_allclose(found[key].mean, x.mean(0), atol=1e-6)
        np.testing.assert_allclose(found[key].variance, ((x - x.mean(0)) ** 2).sum(0) / 48, atol=1e-6)
        np.testing.assert_allclose(found[key].norm, np.sqrt((x**2).sum(0)), atol=1e-5)
        np.testing.assert_allclose(found[key].size, np.abs(x).mean(0), atol=1e-6)
        np.testing.assert_allclose(means[key], x.mean(0), atol=1e-6)
        if key[1] == "o":
            heads = [np.sqrt((h**2).sum(1)).mean() for h in np.split(x, parts.heads, axis=1)]
            np.testing.assert_allclose(found[key].head_norm, heads, atol=1e-5)
        else:
            assert found[key].head_norm is None
    layer = parts.layers[2]
    weight = layer.down.weight.detach().numpy()
    weight = weight.T if isinstance(layer.down, Conv1D) else weight
    np.testing.assert_allclose(column_norms(layer.down), np.sqrt((weight**2).sum(0)), atol=1e-9)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("kind,role", [("attention", "o"), ("mlp", "down")])
def test_a_sublayer_that_adds_nothing_changes_nothing(family, kind, role):
    model = tiny(family)
    with torch.no_grad():
        for parameter in getattr(anatomy(model).layers[1], role).parameters():
            parameter.zero_()
    change = sublayer_change(model, IDS)
    assert abs(float(change[kind][1])) < 1e-5
    assert all(float(change[k][i]) > 1e-4 for k in ("attention", "mlp") for i in range(4) if (k, i) != (kind, 1))
    states = model(IDS, output_hidden_states=True).hidden_states
    expected = [
        1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(states[:3], states[1:4], strict=True)
    ]
    torch.testing.assert_close(change["layer"][:3, 0], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_the_cosine_of_an_mlp_is_the_papers():
    model = tiny("llama")
    seen = {}
    layer = model.model.layers[1]
    with (
        layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.update(x=args[0])),
        layer.mlp.register_forward_hook(lambda m, args, out: seen.update(added=out)),
    ):
        model(IDS)
    expected = 1 - torch.cosine_similarity(seen["x"], seen["x"] + seen["added"], dim=-1).mean()
    torch.testing.assert_close(sublayer_change(model, IDS)["mlp"][1, 0], expected.detach(), atol=1e-5, rtol=1e-4)


def test_norm_outputs_are_summed_over_norms():
    model = tiny("llama", num_hidden_layers=2)
    total, hooks = np.zeros(64), []
    for name, module in model.named_modules():
        if name.endswith("norm") or name.endswith("layernorm"):

            def add(m, args, out):
                total.__iadd__(np.abs(out.detach().numpy()).reshape(-1, 64).mean(0))

            hooks.append(module.register_forward_hook(add))
    assert len(hooks) == 5
    model(IDS)
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(norm_outputs(model, IDS), total, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_what_is_gone_or_skipped_has_no_statistics(family):
    model = tiny(family)
    with undone(model) as surgery:
        cut(model, "attention", [torch.arange(i != 1) for i in range(4)], surgery)
        cut(model, "mlp", [torch.arange(i != 2) for i in range(4)], surgery)
        found, change = inputs_of(model, IDS), sublayer_change(model, IDS)
        assert (1, "o") not in found and (2, "down") not in found and len(found) == 6
        assert change["attention"].isnan().flatten().tolist() == [False, True, False, False]
        assert change["mlp"].isnan().flatten().tolist() == [False, False, True, False]
        scores = column_scores(model, lambda layer, role: column_norms(getattr(layer, role)))
        assert [score.scores.isnan().all(dim=1).nonzero().flatten().tolist() for score in scores] == [[1], [2]]
    with apply(model, "skip-layers:keep=0.75"):
        assert (2, "o") not in inputs_of(model, IDS)
