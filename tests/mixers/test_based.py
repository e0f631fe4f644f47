"""Based: the series against exp, the layers' turns, the size of the state."""

import math

import pytest
import torch

from foveate.backbone import MIXERS, BackboneConfig, Shape, state_bytes
from foveate.backbone.parts import split_heads
from foveate.errors import FoveateError
from foveate.mixers.based import Based, BasedClaim, TaylorMixer, taylor
from foveate.mixers.softmax import SoftmaxMixer
from foveate.tasks.base import Bench
from foveate.train import build
from foveate.train.tasks import TRAIN_TASKS


@pytest.mark.parametrize("f", [1, 2, 5])
def test_features_multiply_to_the_series_of_second_order(f):
    q, k = torch.randn(2, 7, f, dtype=torch.double).unbind()
    s = (q * k).sum(-1) / math.sqrt(f)
    assert taylor(q).shape[-1] == 1 + f + f * (f + 1) // 2
    torch.testing.assert_close((taylor(q) * taylor(k)).sum(-1), 1 + s + s**2 / 2)


def test_the_series_is_near_exp_where_products_are_small():
    q, k = 0.3 * torch.randn(2, 50, 8, dtype=torch.double)
    s = (q * k).sum(-1) / math.sqrt(8)
    assert ((taylor(q) * taylor(k)).sum(-1) - s.exp()).abs().max() < s.abs().max() ** 3 / 4


def test_linear_layers_are_attention_with_the_series_as_weights():
    torch.manual_seed(0)
    module = TaylorMixer(Shape(32, 4), 5).double()
    x = torch.randn(2, 70, 32, dtype=torch.double)
    q, k = split_heads(module.qk(x), 8).chunk(2, 2)
    s = torch.einsum("bnhf,bmhf->bhnm", q, k) / math.sqrt(5)
    weights = (1 + s + s**2 / 2).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    slow = torch.einsum("bhnm,bmhd->bnhd", weights, split_heads(module.v(x), 4)).flatten(2)
    torch.testing.assert_close(module(x)[0], module.out(slow))


def test_layers_take_turns_and_each_part_can_be_left_out():
    kinds = [type(Based().build(Shape(32, 4, layer, 4))) for layer in range(4)]
    assert kinds == [TaylorMixer, SoftmaxMixer] * 2
    assert {type(Based(window=0).build(Shape(32, 4, layer, 2))) for layer in range(2)} == {TaylorMixer}
    assert {type(Based(feature=0).build(Shape(32, 4, layer, 2))) for layer in range(2)} == {SoftmaxMixer}
    assert BackboneConfig(mixer="based:feature=4,window=0").mixer_of(1).feature == 4


@pytest.mark.parametrize("layer, size", [(0, 4 * 15 * 9), (1, 2 * 7 * 32)])
def test_the_state_is_as_large_as_its_dials_say(layer, size):
    module, x = Based(feature=4, window=8).build(Shape(32, 4, layer, 2)), torch.randn(1, 30, 32)
    for n in (10, 30):
        _, state = module(x[:, :n], module.start(1, x))
        state.pop("seen", None)
        assert state_bytes(state) == 4 * size


def test_settings_that_can_not_be():
    with pytest.raises(FoveateError, match="not both 0"):
        MIXERS.parse("based:feature=0,window=0")
    with pytest.raises(FoveateError, match="must be 0 or more"):
        MIXERS.parse("based:feature=-1")
    with pytest.raises(FoveateError, match="heads of an even size"):
        Based().build(Shape(12, 4, 1, 2))


def test_the_claim_runs():
    class Short(BasedClaim):
        steps, seeds, task = 2, (0,), "mqar:pairs=2,length=16,vocab=32"

    finding = Short().run(Bench(build(TRAIN_TASKS.parse("mqar")), None, None))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.metrics["state bytes, small"].value < finding.metrics["state bytes, middle"].value
