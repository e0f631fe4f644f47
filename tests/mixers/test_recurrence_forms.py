"""One recurrence for attention, state space models and gated RNNs."""

import math

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.methods import FUNCTIONS
from foveate.mixers.recurrence_forms import (
    RecurrenceClaim,
    System,
    attention_system,
    by_matrices,
    gated_system,
    random_features,
    selective_system,
    taylor_features,
)
from foveate.tasks.base import Bench
from foveate.train import build
from foveate.train.tasks import TRAIN_TASKS


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.double)


def test_it_is_a_function_of_the_package():
    assert FUNCTIONS["recurrence"].call is fv.recurrence


@pytest.mark.parametrize(
    "system",
    [
        attention_system(drawn(1, 9, 1, 4).exp(), drawn(1, 9, 1, 4).exp()),
        attention_system(drawn(1, 9, 1, 4), drawn(1, 9, 1, 4), normalise=False),
        selective_system(drawn(1, 9, 1).exp(), drawn(1).exp(), drawn(1, 9, 1, 4), drawn(1, 9, 1, 4), drawn(1, 3)),
        System(drawn(1, 9, 1, 4).sigmoid(), drawn(1, 9, 1, 4), drawn(1, 9, 1, 4)),
    ],
)
def test_it_is_what_the_matrices_say(system):
    u = drawn(1, 9, 1, 3)
    torch.testing.assert_close(fv.recurrence(system, u)[0][0, :, 0], by_matrices(system, u))


def test_what_stays_of_normalised_attention_is_the_ratio_of_normalisations():
    q, k = drawn(2, 1, 6, 2, 4).exp()
    system = attention_system(q, k)
    total = (q * k.cumsum(1)).sum(-1)
    torch.testing.assert_close(system.a[:, 1:], total[:, :-1] / total[:, 1:])
    ones, _ = fv.recurrence(system, torch.ones(1, 6, 2, 1, dtype=torch.double))
    torch.testing.assert_close(ones, torch.ones_like(ones))  # weights add up to 1


def test_without_decay_a_selective_model_is_linear_attention():
    b, c, u = drawn(1, 7, 2, 4), drawn(1, 7, 2, 4), drawn(1, 7, 2, 3)
    still = selective_system(torch.ones(1, 7, 2).double(), torch.zeros(2).double(), b, c)
    torch.testing.assert_close(fv.recurrence(still, u)[0], fv.recurrence(attention_system(c, b, normalise=False), u)[0])


def test_it_goes_on_from_a_memory():
    gates, u = drawn(3, 2, 10, 5, 1).sigmoid(), drawn(2, 10, 5, 1)
    whole, last = fv.recurrence(gated_system(*gates), u)
    first, memory = fv.recurrence(gated_system(*gates[:, :, :4]), u[:, :4])
    second, end = fv.recurrence(gated_system(*gates[:, :, 4:]), u[:, 4:], memory=memory)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


def test_features_of_softmax():
    q, k = 0.5 * drawn(2, 20, 3)
    s = (q * k).sum(-1)
    for degree in range(5):
        series = sum(s**p / math.factorial(p) for p in range(degree + 1))
        torch.testing.assert_close((taylor_features(q, degree) * taylor_features(k, degree)).sum(-1), series)
    directions = torch.randn(200_000, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    near = (random_features(q, directions) * random_features(k, directions)).sum(-1)
    torch.testing.assert_close(near, s.exp(), rtol=0.05, atol=0)


def test_what_can_not_be():
    b = drawn(1, 5, 2, 4)
    with pytest.raises(FoveateError, match="don't fit"):
        fv.recurrence(System(None, b, b), drawn(1, 6, 2, 3))
    with pytest.raises(FoveateError, match="don't fit"):
        fv.recurrence(System(None, b, b[..., :3]), drawn(1, 5, 2, 3))
    with pytest.raises(FoveateError, match="must be above 0"):
        fv.recurrence(System(torch.zeros(1, 5, 2), b, b), drawn(1, 5, 2, 3))


def test_the_claim_holds():
    finding = RecurrenceClaim().run(Bench(build(TRAIN_TASKS.parse("mqar")), None, None))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(finding.checks.values()), finding.checks
