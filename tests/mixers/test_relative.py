"""Relative self-attention: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, Shape
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.relative import RelativePositionsForRepetition, gathered, made, skewed
from foveate.tasks.base import Bench
from foveate.train.build import Sizes


def module_of(text="relative", seed=0):
    torch.manual_seed(seed)
    return MIXERS.parse(text).build(Shape(32, 4)).double()


@pytest.mark.parametrize("own", [1, 4, 50])
@pytest.mark.parametrize(("n", "total"), [(1, 1), (1, 9), (9, 9), (5, 12)])
def test_skewed_is_gathered(n, total, own):
    q, e = torch.randn(2, 3, n, 8, dtype=torch.double), torch.randn(3, own, 8, dtype=torch.double)
    seen = torch.ones(n, total, dtype=torch.bool).tril(total - n)
    torch.testing.assert_close(skewed(q, e, total)[..., seen], gathered(q, e, total)[..., seen])


def test_the_equations_token_by_token():
    module, x = module_of("relative:distance=5"), torch.randn(1, 11, 32, dtype=torch.double)
    q, k, v = module.qkv(x)[0].view(11, 3, 4, 8).unbind(1)
    rows = []
    for i in range(11):
        heads = []
        for h in range(4):
            logits = [q[i, h] @ k[j, h] + q[i, h] @ module.distances[h, min(i - j, 4)] for j in range(i + 1)]
            heads.append((torch.stack(logits) / math.sqrt(8)).softmax(0) @ v[: i + 1, h])
        rows.append(module.out(torch.cat(heads)))
    torch.testing.assert_close(module(x)[0][0], torch.stack(rows))


def test_only_distances_count():
    module, x = module_of("relative:distance=64"), torch.randn(1, 6, 32, dtype=torch.double)
    torch.nn.init.zeros_(module.distances)
    order = torch.tensor([3, 0, 4, 2, 1, 5])
    torch.testing.assert_close(module(x[:, order])[0][:, -1], module(x)[0][:, -1])  # without them there is no order
    module = module_of("relative:distance=64")
    assert not torch.allclose(module(x[:, order])[0][:, -1], module(x)[0][:, -1])


def test_memory_of_the_vectors():
    assert made(skewed, 64) == 64 * 32 and made(skewed, 128) == 128 * 32
    assert made(gathered, 128) >= 128 * 128 * 32


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="distance must be 1 or more"):
        MIXERS.parse("relative:distance=0")


class Small(RelativePositionsForRepetition):
    steps, seeds, sizes, length = 2, (0,), Sizes(width=32, layers=1), 16


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["skewing gives what gathering gives"]
    assert [held for said, held in finding.checks.items() if "quadruples" in said] == [True]


def test_the_control_has_absolute_positions():
    small = Small()
    ids = torch.ones(1, 5, dtype=torch.long)
    with torch.no_grad():
        without, absolute = (small.model("softmax:positions=none", given, 0)(ids).logits for given in (False, True))
    torch.testing.assert_close(without[0, 0], without[0, 4])  # one token over and over: nothing tells places apart
    assert not torch.allclose(absolute[0, 0], absolute[0, 4])
