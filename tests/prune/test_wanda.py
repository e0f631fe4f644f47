"""Structured Wanda and magnitude: scores against plain reckoning, as many of every layer."""

from __future__ import annotations

import numpy as np
import torch

from foveate.methods import apply
from foveate.models.surgery import unit_counts
from foveate.models.tiny import tiny
from foveate.prune.magnitude import Magnitude
from foveate.prune.wanda import Wanda

IDS = torch.randint(3, 120, (1, 48), generator=torch.Generator().manual_seed(1))


def read(model):
    """What `o` and `down` of the third layer read, and their weights."""
    seen, layer = [], model.model.layers[2]
    with (
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].detach().numpy())),
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].detach().numpy())),
    ):
        model(IDS)
    return seen[0], layer.self_attn.o_proj.weight.detach().numpy(), seen[1], layer.mlp.down_proj.weight.detach().numpy()


def test_wanda_is_weight_times_input_norm():
    model = tiny("llama").double()
    heads_in, o, channels_in, down = read(model)
    heads, channels = Wanda(keep=0.9).score(model, IDS)
    weighed = np.abs(o) * np.sqrt((heads_in**2).sum(0))
    np.testing.assert_allclose(heads.scores[2], weighed.mean(0).reshape(2, 32).sum(1), rtol=1e-5)
    np.testing.assert_allclose(channels.scores[2], (np.abs(down) * np.sqrt((channels_in**2).sum(0))).mean(0), rtol=1e-5)


def test_magnitude_is_the_norm_of_columns_and_needs_no_text():
    model = tiny("llama").double()
    _, o, _, down = read(model)
    heads, channels = Magnitude(keep=0.9).score(model, torch.empty(1, 0, dtype=torch.long))
    np.testing.assert_allclose(heads.scores[2], [np.linalg.norm(o[:, :32]), np.linalg.norm(o[:, 32:])], rtol=1e-5)
    np.testing.assert_allclose(channels.scores[2], np.linalg.norm(down, axis=0), rtol=1e-5)
    with apply(model, "magnitude:keep=0.9"):  # neither a tokenizer nor text is there
        assert len(set(unit_counts(model, "channel"))) == 1


def test_channels_that_are_planted_as_idle_leave():
    """Small inputs for Wanda, small weights for magnitude; the other would take others."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:16] *= 1e-4
            layer.mlp.down_proj.weight[:, 16:32] *= 1e-4
            layer.mlp.up_proj.weight[16:32] *= 1e4
    share = 1 - 4 * 16 * 192 / 147968
    for name, idle in (("wanda", range(16)), ("magnitude", range(16, 32))):
        with apply(model, f"{name}:keep={share}", calibration=IDS):
            up = [layer.mlp.down_proj.weight for layer in model.model.layers]
        assert all(weight.shape[1] <= 116 for weight in up), idle
        whole = model.model.layers[0].mlp.down_proj.weight
        kept = {int((whole == column[:, None]).all(0).nonzero()[0]) for column in up[0].T}
        assert len(set(idle) - kept) >= 12 and not kept.isdisjoint(set(range(32)) - set(idle))
