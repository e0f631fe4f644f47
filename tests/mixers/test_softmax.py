"""Softmax and linear attention: what the contract does not hold, and their claims."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, Shape
from foveate.backbone.parts import attend, rotated
from foveate.claims import CLAIMS
from foveate.errors import FoveateError
from foveate.mixers.linear import LinearMixer


def by_definition(q, k, v, window=None):
    """(n, heads, d) each, token by token and head by head."""
    n, heads, d = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(n, heads, v.shape[2], dtype=q.dtype)
    for i in range(n):
        for h in range(heads):
            first = 0 if window is None else max(0, i - window + 1)
            weights = (k[first : i + 1, h // group] @ q[i, h] / math.sqrt(d)).softmax(0)
            out[i, h] = weights @ v[first : i + 1, h // group]
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("n", [1, 9, 33])
def test_attention_is_the_definition(window, n):
    q = torch.randn(2, n, 4, 8, dtype=torch.double)
    k, v = (torch.randn(2, n, 2, 8, dtype=torch.double) for _ in range(2))
    got = attend(q, k, v, window=window)
    torch.testing.assert_close(got, torch.stack([by_definition(*each, window) for each in zip(q, k, v, strict=True)]))
    last = attend(q[:, -1:], k, v, window=window)
    torch.testing.assert_close(last, got[:, -1:])


def test_rotary_products_hang_on_distance_alone():
    x, y = (torch.randn(1, 1, 1, 8, dtype=torch.double).expand(1, 12, 1, 8) for _ in range(2))
    a, b = rotated(x), rotated(y)
    products = torch.einsum("bihd,bjhd->ij", a, b)
    torch.testing.assert_close(products[3, 1], products[9, 7])
    assert not torch.isclose(products[3, 1], products[3, 2])


def test_linear_attention_is_the_definition():
    module = LinearMixer(Shape(16, 2)).double()
    x = torch.randn(1, 9, 16, dtype=torch.double)
    q, k, v = module.qkv(x).unflatten(-1, (6, 8)).chunk(3, 2)
    q, k = (torch.nn.functional.elu(each) + 1 for each in (q, k))
    out = torch.zeros(1, 9, 2, 8, dtype=torch.double)
    for i in range(9):
        for h in range(2):
            weights = k[0, : i + 1, h] @ q[0, i, h]
            out[0, i, h] = weights @ v[0, : i + 1, h] / weights.sum()
    torch.testing.assert_close(module(x)[0], module.out(out.flatten(2)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("softmax:positions=learned", "give rope or none"),
        ("softmax:window=-1", "must be 0 or more"),
        ("softmax:kv_heads=3", "can't share 3 KV heads"),
    ],
)
def test_what_cannot_be_is_a_sentence(text, said):
    with pytest.raises(FoveateError, match=said):
        MIXERS.parse(text).build(Shape(32, 4))


@pytest.mark.parametrize("name", ["softmax", "linear"])
def test_the_claims_run(name):
    claim = CLAIMS[name]()
    claim.steps, claim.seeds = 2, (0,)
    found = claim.run(fv.Bench(fv.tiny("llama"), fv.tiny_tokenizer(), fv.load_text("prose")))
    assert all(isinstance(held, bool) for held in found.checks.values())
    assert all(math.isfinite(metric.value) for metric in found.metrics.values())
