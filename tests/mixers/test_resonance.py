"""Synaptic Resonance: its equations, its relevance, the errors, the claim."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from foveate.backbone import MIXERS, Shape
from foveate.backbone.parts import attend, rotated
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.resonance import ResonanceClaim
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks.base import Bench
from foveate.train import Sizes


def plain(module, x):
    """Token by token."""
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, module.head)).unbind(2)
    near = attend(rotated(q), rotated(k), v, window=module.settings.window)
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    trace, delta = module.settings.trace, functional.softplus(module.fall)
    context = x.new_zeros(x.shape[0], module.heads, module.head)
    memory = x.new_zeros(x.shape[0], module.heads, module.head, module.head)
    rows = []
    for t in range(x.shape[1]):
        r = module.bias.expand(x.shape[0], -1)
        if module.sharp is not None:
            r = r + module.sharp * (k[:, t] * context).sum(-1) * module.head**0.5
        r = r.sigmoid()
        context = trace * context + (1 - trace) * k[:, t]
        memory = memory * (-delta * (1 - r)).exp()[..., None, None]
        memory = memory + r[..., None, None] * k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        y = (q[:, t].unsqueeze(-2) @ memory).squeeze(-2)
        y = y / (y.square().mean(-1, keepdim=True) + module.eps).sqrt()
        rows.append(near[:, t] + module.gate(x[:, t]).sigmoid().unsqueeze(-1) * y)
    return module.out(torch.stack(rows, 1).flatten(2))


@pytest.mark.parametrize("relevance", ["true", "false"])
def test_it_is_its_equations(relevance):
    torch.manual_seed(0)
    module = MIXERS.parse(f"resonance:window=5,relevance={relevance}").build(Shape(16, 2)).double()
    for each in (module.bias, module.fall):
        torch.nn.init.normal_(each)
    x = torch.randn(2, 90, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], plain(module, x), atol=1e-6, rtol=1e-6)


def test_what_is_like_its_context_is_more_relevant():
    torch.manual_seed(0)
    module = MIXERS.parse("resonance").build(Shape(16, 2))
    same = functional.normalize(torch.randn(1, 1, 2, 8), dim=-1).expand(-1, 20, -1, -1)
    relevant, context = module.relevant(same, None)
    assert (relevant[0].diff(dim=0) > 0).all() and torch.allclose(relevant[0, 0], torch.tensor(0.5))
    turned, _ = module.relevant(-same[:, :1], context)
    assert (turned < 0.5).all()


def test_bad_settings_get_a_sentence():
    for spec, words in (("resonance:window=0", "window must be"), ("resonance:trace=1", "between 0 and 1")):
        with pytest.raises(FoveateError, match=words):
            MIXERS.parse(spec)
    with pytest.raises(FoveateError, match="even size"):
        MIXERS.parse("resonance").build(Shape(6, 2))


def test_the_claim_runs():
    claim = ResonanceClaim()
    claim.steps, claim.batch, claim.seeds = 2, 4, (0,)
    claim.text, claim.recall = "lm:length=16", "mqar:pairs=2,length=16,vocab=16"
    claim.sizes = Sizes(width=16, heads=2, layers=1)
    found = claim.run(Bench(tiny("llama"), tiny_tokenizer(), load_text("prose")))
    assert all(torch.tensor([m.value, m.low, m.high]).isfinite().all() for m in found.metrics.values())
    assert all(isinstance(held, bool) for held in found.checks.values())
