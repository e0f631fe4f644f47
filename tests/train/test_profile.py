"""The readout of layers, against the same by hand."""

import pytest
import torch
from torch.nn import functional

from foveate.train import Settings, Sizes, build, fit
from foveate.train.profile import depth_profile
from foveate.train.tasks import TRAIN_TASKS

TASK = TRAIN_TASKS.parse("lm:length=16")


def model_of(**sizes):
    model = build(TASK, Sizes(width=16, layers=3, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model


def by_hand(model, batch):
    """The loss, and the stream after each layer, of layers called one after the other."""
    x, after = model.embed(batch.inputs), []
    for layer in model.layers:
        x, _ = layer(x)
        after.append(x)
    x = x if model.norm is None else model.norm(x)
    return functional.cross_entropy(model.head(x).flatten(0, 1), batch.targets.flatten()), after


@pytest.mark.parametrize("norm", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("piece", [64, 2])
def test_each_readout_is_what_it_says(norm, piece):
    model, batch = model_of(norm=norm).double(), TASK.batch(6, "validation", 0, torch.device("cpu"))
    found = depth_profile(model, batch, batch=piece)
    loss, after = by_hand(model, batch)
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), abs=1e-5)  # a backbone's loss is in float32
    for i, layer in enumerate(model.layers):
        norm_ = torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()
        assert float(found.gradient[i]) == pytest.approx(float(norm_), rel=1e-4)
        assert float(found.variance[i]) == pytest.approx(after[i].var(-1, correction=0).mean().item(), rel=1e-6)
        assert float(found.largest[i]) == pytest.approx(after[i].abs().max().item(), rel=1e-6)
        kept = model.layers
        model.layers = torch.nn.ModuleList([each for j, each in enumerate(kept) if j != i])
        without, _ = by_hand(model, batch)
        model.layers = kept
        assert float(found.damage[i]) == pytest.approx(without.item() - loss.item(), abs=1e-5)


def test_a_model_is_left_as_it_was():
    model = model_of(channel="moe").train()
    model(torch.ones(2, 5, dtype=torch.long), targets=torch.ones(2, 5, dtype=torch.long)).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    depth_profile(model, TASK, count=4)
    assert model.training
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    assert not any(layer._forward_hooks for layer in model.layers)


def test_a_layer_that_does_nothing_does_no_harm_when_it_goes():
    model = model_of()
    with torch.no_grad():
        model.layers[1].mixer.out.weight.zero_()
        model.layers[1].channel.out.weight.zero_()
    found = depth_profile(model, TASK, count=8)
    assert float(found.damage[1]) == 0 and abs(float(found.damage[0])) > 1e-6
    assert float(found.variance[1]) == float(found.variance[0])


def test_tables_and_scores():
    model = model_of()
    for weight in model.layers[2].parameters():
        weight.requires_grad_(False)
    found = depth_profile(model, "lm:length=16", count=4)
    table = found.to_dict()
    assert list(table) == ["layer", "gradient", "variance", "largest", "damage"] and table["layer"] == [0, 1, 2]
    assert found.to_rows()[1]["variance"] == table["variance"][1]
    scores = found.scores()
    assert {name: (each.kind, tuple(each.scores.shape)) for name, each in scores.items()} == {
        "gradient": ("layer", (3, 1)),
        "damage": ("layer", (3, 1)),
    }
    assert scores["gradient"].scores[2].isnan() and not scores["damage"].scores.isnan().any()
    assert found.deep("variance") == pytest.approx(sum(table["variance"][1:]) / 2)
    assert found.growth("variance") == pytest.approx(table["variance"][2] / table["variance"][0])


@pytest.mark.parametrize("task", ["mqar:pairs=1,length=8,vocab=8", "lm:length=8"])
def test_after_training(task):
    task = TRAIN_TASKS.parse(task)
    model = build(task, Sizes(width=16, layers=2, channel="moe"))
    fit(model, task, Settings(steps=3, batch=4))
    found = depth_profile(model, task, count=8)
    assert all(each.isfinite().all() for each in (found.gradient, found.variance, found.largest, found.damage))
