"""Recursive: tied maps are held once, corrections are the best of their rank, what is not tied stays each depth's."""

from __future__ import annotations

import copy

import pytest
import torch

import foveate as fv
from foveate.convert.recursive import step_layers
from foveate.errors import FoveateError
from foveate.methods import apply
from foveate.models.surgery import cut, layer_parameters, undone
from foveate.models.tiny import tiny

IDS = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(1))


def effective(module):
    """The weight that a looped map stands for, float64."""
    weight = module._owner[0].base.weight.double()
    return weight + module.up.weight.double() @ module.down.weight.double() if module.rank else weight


@pytest.mark.parametrize("init", ["average", "stepwise", "lower"])
@pytest.mark.parametrize("loops", [2, 4])
def test_the_correction_is_the_best_of_its_rank(init, loops):
    model = tiny("llama", num_hidden_layers=8)
    weights = [layer.mlp.up_proj.weight.detach().double() for layer in model.model.layers]
    unique = 8 // loops
    with apply(model, f"recursive:rank=6,loops={loops},init={init}"):
        for index, layer in enumerate(model.model.layers):
            place = index % unique
            shared = {
                "average": torch.stack(weights[place::unique]).mean(0),
                "stepwise": weights[step_layers(8, unique)[place]],
                "lower": weights[place],
            }[init]
            torch.testing.assert_close(layer.mlp.up_proj._owner[0].base.weight.double(), shared, atol=1e-6, rtol=1e-5)
            lost = (effective(layer.mlp.up_proj) - weights[index]).norm()
            least = torch.linalg.svdvals(weights[index] - shared)[6:].norm()
            assert abs(lost - least) < 1e-4
            owner = model.model.layers[place].mlp.up_proj
            assert layer.mlp.up_proj._owner[0] is owner


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
def test_shared_maps_are_held_and_saved_once(family):
    model = tiny(family)
    whole = layer_parameters(model)
    parts = fv.anatomy(model)
    maps = sum(
        getattr(layer, role).weight.numel()
        for layer in parts.layers
        for role in layer.names
        if role not in ("attention", "mlp")
    )
    with apply(model, "recursive:rank=0"):
        assert layer_parameters(model) == whole - maps // 2  # norms and biases stay each depth's
        keys = [key for key in model.state_dict() if "base.weight" in key]
        assert len({value.data_ptr() for value in model.state_dict().values()}) <= len(model.state_dict())
        assert len(keys) == sum(len(layer.names) - 1 - (parts.layers[0].mlp is not None) for layer in parts.layers[:2])
    assert layer_parameters(model) == whole


def test_zero_begins_as_the_tied_model_and_the_same_size():
    model = tiny("llama")
    with apply(model, "recursive:rank=0"):
        tied = model(IDS).logits
    with apply(model, "recursive:rank=8,lora=zero"):
        torch.testing.assert_close(model(IDS).logits, tied, atol=1e-5, rtol=1e-5)
        zero = layer_parameters(model)
    with apply(model, "recursive:rank=8"):
        assert layer_parameters(model) == zero
        assert not torch.allclose(model(IDS).logits, tied, atol=1e-2)


def test_a_copy_shares_within_itself():
    model = tiny("llama")
    with apply(model, "recursive:rank=4"):
        logits = model(IDS).logits
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for layer in model.model.layers[:2]:
                layer.mlp.up_proj.base.weight.zero_()
        torch.testing.assert_close(twin(IDS).logits, logits)
        assert twin.model.layers[3].mlp.up_proj._owner[0] is twin.model.layers[1].mlp.up_proj


def test_training_reaches_the_shared_map_from_every_depth():
    model = tiny("llama")
    with apply(model, "recursive:rank=4"):
        model(IDS, labels=IDS).loss.backward()
        base = model.model.layers[0].mlp.up_proj.base.weight
        both = base.grad.clone()
        model.zero_grad()
        model.model.layers[2].mlp.up_proj._owner = (copy.deepcopy(model.model.layers[0].mlp.up_proj),)
        model(IDS, labels=IDS).loss.backward()
        assert not torch.allclose(base.grad, both)


def test_what_shares_can_not_leave():
    model = tiny("llama")
    with apply(model, "recursive:rank=4"), undone(model) as surgery:
        with pytest.raises(FoveateError, match="shares"):
            cut(model, "mlp", [torch.arange(int(i != 0)) for i in range(4)], surgery)
        with pytest.raises(FoveateError, match="can't be cut"):
            cut(model, "channel", [torch.arange(100)] * 4, surgery)
        cut(model, "mlp", [torch.arange(1)] * 4, surgery)  # nothing leaves


def test_wrong_requests_are_sentences():
    model = tiny("llama")
    for text, words in (
        ("recursive:rank=-1", "0 or more"),
        ("recursive:rank=4,loops=1", "2 or more"),
        ("recursive:rank=4,init=upper", "average"),
        ("recursive:rank=4,lora=random", "svd"),
        ("recursive:rank=4,loops=3", "divides"),
        ("low-rank:keep=0.5,aware=false+recursive:rank=4", "already"),
    ):
        with pytest.raises(FoveateError, match=words), apply(model, text):
            pass
    with undone(model) as surgery:
        cut(model, "channel", [torch.arange(100), *[torch.arange(128)] * 3], surgery)
        with pytest.raises(FoveateError, match="differ in shape"), apply(model, "recursive:rank=4"):
            pass
    with undone(model) as surgery:
        cut(model, "mlp", [torch.arange(int(i != 0)) for i in range(4)], surgery)
        with pytest.raises(FoveateError, match="no map"), apply(model, "recursive:rank=4"):
            pass
