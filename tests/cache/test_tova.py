"""TOVA: all KV heads of a layer hold the same tokens."""

from __future__ import annotations

import torch

from foveate.cache.budgets import Budget, budget
from foveate.methods import apply
from foveate.models.anatomy import anatomy
from foveate.models.tiny import tiny

MODEL = tiny("llama")
IDS = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(3))


@budget("test-first-head-more")
class FirstHeadMore(Budget):
    """The first KV head of each layer holds three times as much as the second."""

    claim = "for tests"

    def weights(self, target, keep):
        return torch.tensor([3.0, 1.0]).repeat(len(anatomy(target.model).layers), 1)


@torch.no_grad()
def read(recipe):
    cache, steps = None, []
    with apply(MODEL, recipe):
        for size in (20, 5, 1, 1, 1, 8, 1):
            cache = MODEL(IDS[:, :size], past_key_values=cache, use_cache=True).past_key_values
            steps.append([layer.positions for layer in cache.layers])
    return steps


def test_heads_hold_the_same_tokens():
    for layers in read("tova:entries=8"):
        for positions in layers:
            assert torch.equal(positions[:, 0], positions[:, 1])
    assert any(not torch.equal(positions[0], positions[1]) for positions in layers)  # but sequences don't


def test_a_head_with_a_smaller_budget_holds_the_best_of_a_larger_one():
    for layers in read("tova:entries=8,budget=test-first-head-more"):
        for positions in layers:
            for first, second in positions.tolist():
                assert len({*first} - {-1}) == 12 and len({*second} - {-1}) == 4
                assert {*second} <= {*first, -1}
