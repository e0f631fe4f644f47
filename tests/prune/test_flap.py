"""FLAP: its score is the paper's, what is constant leaves without a trace, and compensation is the lost mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from foveate.methods import apply
from foveate.models.anatomy import anatomy
from foveate.models.surgery import layer_parameters, undone, unit_costs, unit_counts
from foveate.models.tiny import tiny
from foveate.plans import Uniform, plan_for
from foveate.prune.flap import Flap

IDS = torch.randint(3, 120, (1, 48), generator=torch.Generator().manual_seed(1))


def test_the_score_is_the_papers():
    """Reckoned in numpy from what `o` and `down` read."""
    model, seen, hooks = tiny("llama").double(), {}, []
    for i, layer in enumerate(model.model.layers):
        for kind, module in (("kv_head", layer.self_attn.o_proj), ("channel", layer.mlp.down_proj)):

            def look(m, args, key=(kind, i)):
                seen[key] = (args[0][0].detach().numpy(), m.weight.detach().numpy())

            hooks.append(module.register_forward_pre_hook(look))
    model(IDS)
    for hook in hooks:
        hook.remove()
    heads, channels = Flap(keep=0.8).score(model, IDS)
    assert (heads.kind, channels.kind) == ("kv_head", "channel")
    for (kind, i), (x, w) in seen.items():
        fluctuation = ((x - x.mean(0)) ** 2).mean(0) * (w**2).sum(0)
        standard = (fluctuation - fluctuation.mean()) / fluctuation.std(ddof=1)
        if kind == "kv_head":  # two query heads of 16 each
            np.testing.assert_allclose(heads.scores[i], standard.reshape(2, 32).mean(1), rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_allclose(channels.scores[i], standard, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_constant_channels_leave_first_and_with_no_error(family):
    """A quarter of the channels of every layer give a bias and nothing else."""
    model, gone = tiny(family), list(range(0, 128, 4))
    with torch.no_grad():
        for layer in anatomy(model).layers:
            weight = layer.up.weight.T if isinstance(layer.up, Conv1D) else layer.up.weight
            weight[gone] = 0
            layer.up.bias[gone] = torch.linspace(0.5, 3, 32)
    whole, flap = model(IDS).logits, Flap(keep=0.8)
    channels = flap.score(model, IDS)[1]
    for row in channels.scores:  # some of OPT's are constant of themselves, since its ReLU is never open
        torch.testing.assert_close(row[gone], row.min().expand(32))
    keep = 1 - 4 * 32 * unit_costs(model, "channel")[0] / layer_parameters(model)
    plan = plan_for(model, channels, keep, Uniform())
    for means, alike in ((flap.means(model, IDS), True), (None, False)):
        with undone(model) as surgery:
            replace(plan, means=means).carry_out(model, surgery)
            assert unit_counts(model, "channel") == [96] * 4
            assert torch.allclose(model(IDS).logits, whole, atol=2e-4, rtol=1e-4) == alike


def test_compensation_keeps_the_mean_of_a_layers_output():
    """The first layer's attention, which reads what it read before, gives the same on average."""
    model = tiny("llama")

    def mean_output():
        seen = []
        with model.model.layers[0].self_attn.register_forward_hook(
            lambda m, a, out: seen.append(out[0].mean(dim=(0, 1)))
        ):
            model(IDS)
        return seen[0]

    whole, results = mean_output(), {}
    for compensate in ("true", "false"):
        with apply(model, f"flap:keep=0.7,budget=uniform,compensate={compensate}", calibration=IDS):
            assert model.model.layers[0].self_attn.o_proj.in_features < 64
            assert (model.model.layers[0].self_attn.o_proj.bias is not None) == (compensate == "true")
            results[compensate] = mean_output()
    torch.testing.assert_close(results["true"], whole, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(results["false"], whole, atol=1e-2)


def test_weights_that_fluctuate_less_leave_first(smollm2):
    """On the default model, a tenth of the layers' parameters leaves, and it still predicts text."""
    model, tokenizer = smollm2
    ids = tokenizer("The quick brown fox jumps over the lazy dog. " * 6, return_tensors="pt").input_ids
    with torch.no_grad(), apply(model, "flap:keep=0.9", calibration=ids):
        assert model(ids, labels=ids).loss < 3
