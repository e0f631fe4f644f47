"""EMoE: clusters of equal size, all experts are the model itself, few experts are what a plain loop gives."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.depth.emoe import EMoE, _places, _RandomExperts, balanced_clusters, captured
from foveate.errors import FoveateError
from foveate.methods import Target, apply
from foveate.models.surgery import Surgery, count_parameters, settle
from foveate.models.tiny import TINY_FAMILIES, tiny
from foveate.portable.experts import Experts

IDS = torch.randint(3, 120, (1, 30), generator=torch.Generator().manual_seed(1))


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, Experts)]


@torch.no_grad()
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_all_experts_are_the_model_itself(family):
    model = tiny(family)
    # The eager attention of Gemma 2 has a softmax in float32.
    model = model if family == "gemma2" else model.double()
    full, parameters = model(IDS).logits, count_parameters(model)
    with apply(model, "emoe:experts=8,top_k=8"):
        assert count_parameters(model) == parameters and len(experts_of(model)) == 4
        close = {"atol": 1e-4, "rtol": 1e-4} if family == "gemma2" else {"atol": 1e-9, "rtol": 1e-9}
        torch.testing.assert_close(model(IDS).logits, full, **close)
    assert not experts_of(model) and torch.equal(model(IDS).logits, full)


@torch.no_grad()
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_few_experts_are_what_a_plain_loop_gives(family):
    """The reference has the model's own maps and a mask over neurons: those of the clusters with the best mean."""
    model = tiny(family).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = fv.anatomy(model).layers[1]
    read = layer.gate or layer.up or layer.gate_up
    keys = read.weight.T if family == "gpt2" else read.weight
    order = balanced_clusters(keys[:128], 8)
    seen = {}
    hooks = [
        read.register_forward_hook(lambda m, args, out: seen.update(x=args[0].flatten(0, -2), read=out.flatten(0, -2))),
        layer.down.register_forward_pre_hook(lambda m, args: seen.update(inner=args[0].flatten(0, -2))),
    ]
    model(IDS)
    for hook in hooks:
        hook.remove()
    expected = []
    for pre, inner in zip(seen["read"][:, :128], seen["inner"], strict=True):
        means = [float(pre[cluster].mean()) for cluster in order.view(8, 16)]
        best = sorted(range(8), key=lambda i: -means[i])[:3]
        mask = torch.zeros(128, dtype=torch.double)
        for cluster in best:
            mask[order.view(8, 16)[cluster]] = 1
        expected.append(layer.down((inner * mask)[None])[0])
    with apply(model, "emoe:experts=8,top_k=3"):
        experts = experts_of(model)[1]
        torch.testing.assert_close(experts(seen["x"]), torch.stack(expected), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(experts(seen["x"][3:4]), expected[3][None], atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_pieces_and_batches(family):
    model = tiny(family)
    with apply(model, "emoe:experts=8,top_k=4"):
        whole = model(IDS).logits
        cache, pieces = None, []
        for piece in (IDS[:, :12], IDS[:, 12:13], IDS[:, 13:]):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        padded = torch.cat([IDS, torch.cat([torch.full((1, 13), 256), IDS[:, :17]], dim=1)])
        mask = (padded != 256).long()
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
        both = model.generate(padded, attention_mask=mask, **options)
        alone = [model.generate(IDS[:, :n], **options)[0, n:] for n in (30, 17)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-3, rtol=1e-3)
    assert torch.equal(both[:, 30:], torch.stack(alone))


def test_work_is_saved():
    """Only the weights of chosen experts have anything to do with the output."""
    experts = Experts(8, 32, 4, 1, "silu")
    token = torch.randn(1, 8)
    chosen = int(experts.chosen(token))
    out = experts(token)
    out.sum().backward()
    worked = experts.up.weight.grad.view(4, 8, 8).abs().sum(dim=(1, 2)) > 0
    assert worked.tolist() == [i == chosen for i in range(4)]
    with torch.no_grad():
        for i in range(4):
            if i != chosen:
                experts.up.weight[8 * i : 8 * i + 8] = torch.nan
        assert torch.equal(experts(token), out)


def test_mean_keys_follow_the_weights():
    experts = Experts(8, 32, 4, 2, "gelu", gated=False, bias=True)
    before = experts.means()[0].clone()
    with torch.no_grad():
        experts.up.weight.mul_(2)
        experts.up.bias.fill_(3.0)
    torch.testing.assert_close(experts.means()[0], 2 * before)
    assert experts.means()[1].tolist() == [3.0] * 4
    assert set(experts.state_dict()) == {"up.weight", "up.bias", "down.weight"}
    again = Experts(**experts.settings)
    again.load_state_dict(experts.state_dict())
    token = torch.randn(5, 8)
    assert torch.equal(again(token), experts(token)) and again.settings == experts.settings
    assert experts.double().means()[0].dtype == torch.float64


def test_clusters_are_of_equal_size_and_find_what_was_planted():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 40, generator=generator)
    planted = torch.arange(6).repeat(20)[torch.randperm(120, generator=generator)]
    length = 0.1 + torch.rand(120, 1, generator=generator)
    keys = length * (centres[planted] + 0.3 * torch.randn(120, 40, generator=generator))
    order = balanced_clusters(keys, 6)
    assert sorted(order.tolist()) == list(range(120))
    sizes = [len(planted[group].unique()) for group in order.view(6, 20)]
    assert sizes.count(1) >= 4  # turns of k-means may end with two that are mixed
    assert torch.equal(order, balanced_clusters(keys, 6))


def test_places_are_as_the_greedy_loop_gives_them():
    likeness = torch.rand(24, 4, generator=torch.Generator().manual_seed(2))
    expected, room = [None] * 24, [6] * 4
    for flat in likeness.flatten().argsort(descending=True).tolist():
        neuron, cluster = divmod(flat, 4)
        if expected[neuron] is None and room[cluster]:
            expected[neuron] = cluster
            room[cluster] -= 1
    assert _places(likeness).tolist() == expected


def test_the_activation_captured_is_the_planted_one():
    model = tiny("llama")
    everything = captured(model, IDS, EMoE(experts=8, top_k=8))
    some = captured(model, IDS, EMoE(experts=8, top_k=4))
    control = captured(model, IDS, _RandomExperts(experts=8, top_k=4))
    assert everything == pytest.approx([1.0]) and 0 < some[0] < 1 and 0 < control[0] < 1
    assert not experts_of(model)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_for_good_and_with_what_left(family):
    model = tiny(family)
    recipe = [fv.Recipe.of(text).methods[0] for text in ("skip-layers:keep=0.75", "emoe:experts=8,top_k=4")]
    with apply(model, recipe):
        expected = model(IDS).logits
    target = Target.of(model, calibration=IDS)
    for each in recipe:
        each.change(target, Surgery())
    settle(model)
    assert len(experts_of(model)) == len(fv.anatomy(model).layers) == 3
    torch.testing.assert_close(model(IDS).logits, expected)


def test_a_layer_with_experts_and_without_attention_is_still_there():
    model = tiny("llama")
    with apply(model, "drop-attention:keep=0.5+emoe:experts=8,top_k=4", calibration=IDS):
        expected = model(IDS).logits
    target = Target.of(model, calibration=IDS)
    for each in fv.Recipe.of("drop-attention:keep=0.5+emoe:experts=8,top_k=4").methods:
        each.change(target, Surgery())
    settle(model)
    assert len(model.model.layers) == 4
    torch.testing.assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize(
    "recipe,says",
    [
        ("emoe:experts=4,top_k=5", "from 1 to"),
        ("emoe:experts=4,top_k=0", "from 1 to"),
        ("emoe:experts=5,top_k=1", "128 neurons"),
        ("emoe:experts=4,top_k=1+emoe:experts=4,top_k=1", "before what replaces"),
    ],
)
def test_what_can_not_be_gets_a_sentence(recipe, says):
    model = tiny("llama")
    with pytest.raises(FoveateError, match=says), apply(model, recipe):
        pass
    assert not experts_of(model)
