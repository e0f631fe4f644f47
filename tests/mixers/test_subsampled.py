"""Stochastically subsampled attention: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, BackboneConfig, BackboneForCausalLM, Shape
from foveate.backbone.parts import rotated
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.subsampled import SubsampledGeneralisesBetter, ensemble
from foveate.tasks.base import Bench
from foveate.train.build import Sizes


def module_of(text="subsampled"):
    torch.manual_seed(0)
    return MIXERS.parse(text).build(Shape(32, 4)).double()


def texts(n=37):
    return torch.randn(2, n, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def by_hand(module, x, places, there):
    """One text, token by token, from the keys that each block drew."""
    block = module.settings.block
    q, k, v = module.qkv(x).view(len(x), 3, 4, 8).unbind(1)
    q, k = rotated(q[None])[0], rotated(k[None])[0]
    rows = []
    for t in range(len(x)):
        b = t // block
        read = [*range(b * block, t + 1), *places[b][there[b]].tolist()]
        heads = [(k[read, h] @ q[t, h] / math.sqrt(8)).softmax(0) @ v[read, h] for h in range(4)]
        rows.append(module.out(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize("text", ["subsampled", "subsampled:block=3,keep=0.5", "subsampled:block=1,power=0"])
def test_training_reads_what_was_drawn(text):
    module, x = module_of(text).train(), texts()
    torch.manual_seed(5)
    y, _ = module(x)
    torch.manual_seed(5)
    places, there = module.draw(37, x.device)
    for i in range(2):
        torch.testing.assert_close(y[i], by_hand(module, x[i], places, there))


def test_all_keys_are_read_at_evaluation_and_with_a_state():
    module, x = module_of().eval(), texts()
    whole = MIXERS.parse("softmax").build(Shape(32, 4)).double()
    whole.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x)[0], whole(x)[0])
    module.train()
    torch.testing.assert_close(module(x, module.start(2, x))[0], whole(x)[0])
    torch.testing.assert_close(module(x[:, :8])[0], whole(x[:, :8])[0])  # one block


def test_a_keep_of_one_reads_all_in_training_too():
    module, x = module_of("subsampled:keep=1,block=4").train(), texts(32)
    drawn, _ = module(x)
    torch.testing.assert_close(drawn, module.eval()(x)[0])


def test_draws_are_keys_before_the_block_once_each_and_near_ones_the_more():
    module = module_of()
    draws = [module.draw(128, torch.device("cpu")) for _ in range(100)]
    counts = torch.zeros(128)
    for places, there in draws:
        assert places.shape == (16, 24) and there[0].sum() == 0 and there[1].sum() == 8 and there[4:].all()
        for block in range(16):
            got = places[block][there[block]]
            assert (got < 8 * block).all() and len(got.unique()) == len(got)
        counts[places[-1]] += 1
    assert len({tuple(places[-1].tolist()) for places, _ in draws}) == 100
    assert counts[119] == 100 and counts[112:120].mean() > 70 and 5 < counts[:60].mean() < 35
    alike = module_of("subsampled:power=0")
    counts = torch.zeros(128)
    for _ in range(200):
        counts[alike.draw(128, torch.device("cpu"))[0][-1]] += 1
    assert counts[:60].mean() == pytest.approx(float(counts[60:120].mean()), rel=0.15)


def test_no_token_sees_a_later_one_in_training():
    module, x = module_of().train(), texts().requires_grad_()
    y, _ = module(x)
    for t in (0, 7, 20):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        assert gradient[0, t + 1 :].abs().max() == 0


def test_an_ensemble_is_the_mean_of_probabilities_and_leaves_the_model():
    torch.manual_seed(0)
    model = BackboneForCausalLM(BackboneConfig(vocab_size=20, hidden_size=32, mixer="subsampled")).train()
    with torch.no_grad():
        model.head.weight.mul_(50)
    ids = torch.randint(20, (2, 40))
    torch.manual_seed(7)
    many = ensemble(model, ids, 3)
    assert model.training
    torch.manual_seed(7)
    ones = [ensemble(model, ids, 1) for _ in range(3)]
    torch.testing.assert_close(many, torch.stack([each.exp() for each in ones]).mean(0).log())
    assert not torch.allclose(ones[0], ones[1])
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)  # draws no more


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="above 0, 1 at most"):
        MIXERS.parse("subsampled:keep=0")
    with pytest.raises(FoveateError, match="block must be 1 or more"):
        MIXERS.parse("subsampled:block=0")
    model = BackboneForCausalLM(BackboneConfig(vocab_size=20, hidden_size=32))
    with pytest.raises(FoveateError, match="draws no keys"):
        ensemble(model, torch.zeros(1, 9, dtype=torch.long), 2)
    model = BackboneForCausalLM(BackboneConfig(vocab_size=20, hidden_size=32, mixer="subsampled"))
    with pytest.raises(FoveateError, match="the mean of 0 draws is nothing"):
        ensemble(model, torch.zeros(1, 9, dtype=torch.long), 0)


class Small(SubsampledGeneralisesBetter):
    steps, seeds, sizes, length, draws, batches = 2, (0,), Sizes(width=32, layers=1), 64, 2, 1


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
