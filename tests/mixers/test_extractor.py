"""Extractors: their equations, the errors, the claim."""

from __future__ import annotations

import pytest
import torch

from foveate.backbone import MIXERS, Shape
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.extractor import KINDS, ExtractorClaim
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks.base import Bench
from foveate.train import Sizes


def plain(module, x):
    """Token by token, distance by distance."""
    weights = module.weight.flip(-1)
    rows = []
    for t in range(x.shape[1]):
        total = torch.zeros_like(x[:, 0])
        for i in range(min(t + 1, module.length)):
            past = x[:, t - i]
            if module.kind == "she":
                total = total + past @ weights[:, :, i].T
            else:
                past = past if module.value is None else module.value(past)
                total = total + past * weights[:, 0, i]
        here = x[:, t] if module.adjust is None else module.adjust(x[:, t])
        rows.append(here * total / min(t + 1, module.length) ** 0.5)
    return module.out(torch.stack(rows, 1))


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_its_equations(kind, length):
    torch.manual_seed(0)
    module = MIXERS.parse(f"extractor:kind={kind},length={length}").build(Shape(8, 2)).double()
    x = torch.randn(2, 19, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], plain(module, x))
    state, rows = module.start(2, x), []
    for piece in x.split([3, 1, 11, 4], 1):
        y, state = module(piece, state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), module(x)[0])
    module.zero_grad()
    module(x)[0].square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_each_kind_has_fewer_weights_than_the_one_before():
    sizes = [
        sum(p.numel() for p in MIXERS.parse(f"extractor:kind={kind}").build(Shape(16, 2)).parameters())
        for kind in KINDS
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="there is no kind 'best': give she, he, we or me"):
        MIXERS.parse("extractor:kind=best")
    with pytest.raises(FoveateError, match="length must be at least 1"):
        MIXERS.parse("extractor:length=0")


def test_the_claim_runs():
    claim = ExtractorClaim()
    claim.steps, claim.batch, claim.seeds, claim.length, claim.lengths, claim.rounds = 2, 4, (0,), 16, (16, 32), 2
    claim.sizes = Sizes(width=16, heads=2, layers=1)
    found = claim.run(Bench(tiny("llama"), tiny_tokenizer(), load_text("prose")))
    assert all(torch.tensor([m.value, m.low, m.high]).isfinite().all() for m in found.metrics.values())
    assert all(isinstance(held, bool) for held in found.checks.values())
