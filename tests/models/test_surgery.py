"""Surgery: a cut model is the original with those units' contributions gone, and undo leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.anatomy import anatomy
from foveate.models.surgery import (
    KINDS,
    Surgery,
    count_parameters,
    cut,
    layer_parameters,
    settle,
    undone,
    unit_costs,
    unit_counts,
)
from foveate.models.tiny import TINY_FAMILIES, tiny

IDS = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(1))
POST_NORM = ("gemma2", "gemma3_text", "olmo2")
"""Families whose sublayers end in a norm, or have one only there."""
GONE = {  # kind -> layer -> units that leave; every KV head of four tiny query heads on two has one left
    "kv_head": {0: [1], 2: [0]},
    "head": {0: [0, 3], 3: [1, 2]},
    "channel": {0: [0, 5, 127], 1: list(range(100)), 3: [64]},
    "attention": {0: [0], 2: [0]},
    "mlp": {1: [0], 3: [0]},
    "layer": {0: [0], 2: [0]},
}
CLOSE = {"atol": 2e-5, "rtol": 2e-5}  # models take norms, and some the softmax, in float32


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def model(request):
    return tiny(request.param).double()


def keeps(model, kind, gone):
    """The units that stay, for `cut`."""
    return [
        torch.tensor([u for u in range(count) if u not in gone.get(i, ())], dtype=torch.long)
        for i, count in enumerate(unit_counts(model, kind))
    ]


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def columns(layer, parts, kind, units):
    """The inputs of `o` or `down` that belong to some units of a layer."""
    if kind == "channel":
        return units
    group = parts.heads // parts.kv_heads if kind == "kv_head" else 1
    heads = [head * group + i for head in units for i in range(group)]
    return [head * parts.head_dim + i for head in heads for i in range(parts.head_dim)]


class NormOfSome(nn.Module):
    """RMSNorm as if only some of the channels were there: the plain reference."""

    def __init__(self, norm, kept):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self.kept = torch.zeros(norm.weight.shape[0], dtype=norm.weight.dtype)
        self.kept[kept] = 1

    def forward(self, x):
        x, dtype = x.float(), x.dtype  # as the models do it
        mean = (x**2 * self.kept).sum(-1, keepdim=True) / self.kept.sum()
        return self.weight * self.kept * (x * torch.rsqrt(mean + self.eps)).to(dtype)


@torch.no_grad()
def reference(model, kind, gone):
    """A copy of the model in which what some units contribute is zero."""
    model = copy.deepcopy(model)
    parts = anatomy(model)
    for index, units in gone.items():
        layer = parts.layers[index]
        whole = {"attention": ["o"], "mlp": ["down"], "layer": ["o", "down"]}.get(kind)
        if whole:
            for role in whole:
                for parameter in getattr(layer, role).parameters():
                    parameter.zero_()
            continue
        which = columns(layer, parts, kind, units)
        reads = layer.down if kind == "channel" else layer.o
        if isinstance(reads, Conv1D):
            reads.weight[which] = 0
        else:
            reads.weight[:, which] = 0
        if kind != "channel" and parts.family == "olmo2":  # its norms of queries and keys see all heads at once
            dim = parts.head_dim
            kv = units if kind == "kv_head" else []
            for name, lost, heads in (("q_norm", which, parts.heads), ("k_norm", None, parts.kv_heads)):
                lost = [u * dim + i for u in kv for i in range(dim)] if lost is None else lost
                kept = [i for i in range(heads * dim) if i not in lost]
                setattr(layer.attention, name, NormOfSome(getattr(layer.attention, name), kept))
    return model


@pytest.mark.parametrize("kind", GONE)
def test_cut_is_the_original_with_contributions_zeroed(model, kind):
    expected = logits(reference(model, kind, GONE[kind]))
    whole, before = logits(model), count_parameters(model)
    assert not torch.allclose(expected, whole)  # these units matter
    with undone(model) as surgery:
        cut(model, kind, keeps(model, kind, GONE[kind]), surgery)
        torch.testing.assert_close(logits(model), expected, **CLOSE)
        assert count_parameters(model) < before
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("kind", GONE)
def test_costs_are_the_parameters_that_leave(model, kind):
    costs, before = unit_costs(model, kind), layer_parameters(model)
    with undone(model) as surgery:
        cut(model, kind, keeps(model, kind, GONE[kind]), surgery)
        lost = before - layer_parameters(model)
    expected = sum(costs[index] * len(units) for index, units in GONE[kind].items())
    # Norms that leave with a sublayer, biases that stay with a map, are next to nothing.
    assert expected == pytest.approx(lost, rel=0.02)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hidden"])
def test_nothing_is_changed_where_everything_stays(model, kind):
    modules = dict(model.named_modules())
    with undone(model) as surgery:
        cut(model, kind, keeps(model, kind, {}), surgery)
        assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_is_a_norm_over_fewer_channels(tied):
    model = tiny("llama", tie_word_embeddings=tied).double()
    gone = [0, 7, 40, 63]
    kept = torch.tensor([i for i in range(64) if i not in gone])
    plain = copy.deepcopy(model)
    parts = anatomy(plain)
    with torch.no_grad():
        plain.model.embed_tokens.weight[:, gone] = 0
        for layer in parts.layers:
            for reads in (layer.o, layer.down):
                reads.weight[gone] = 0
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer.module, name, NormOfSome(getattr(layer.module, name), kept))
        plain.model.norm = NormOfSome(plain.model.norm, kept)
    with undone(model) as surgery:
        cut(model, "hidden", [kept], surgery)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        torch.testing.assert_close(logits(model), logits(plain), **CLOSE)


def test_hidden_runs_wherever_it_is_allowed(model):
    kept = torch.arange(0, 64, 2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config, whole = model.config.to_dict(), logits(model)
    if model.config.model_type.startswith("gemma"):
        with undone(model) as surgery, pytest.raises(FoveateError, match="scaled by their width"):
            cut(model, "hidden", [kept], surgery)
        return
    with undone(model) as surgery:
        cut(model, "hidden", [kept], surgery)
        parts = anatomy(model)
        assert parts.hidden == 32 and parts.head_dim == 16 // (2 if model.config.model_type == "qwen3" else 1)
        assert unit_counts(model, "head") == [4] * 4  # a head is as wide as it was
        assert logits(model).isfinite().all()
        assert all(p.shape[0] != 64 and p.shape[-1] != 64 for p in (parts.embedding.weight, parts.head.weight))
        # Heads can be cut afterwards all the same.
        cut(model, "kv_head", keeps(model, "kv_head", GONE["kv_head"]), surgery)
        assert logits(model).isfinite().all()
    assert model.config.to_dict() == config
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("kind", ["kv_head", "head", "channel", "attention", "mlp"])
def test_means_stay_as_constants(model, kind):
    """The reference puts the mean where the unit's output was, in a hook."""
    parts, generator = anatomy(model), torch.Generator().manual_seed(2)
    role = {"channel": "down", "head": "o", "kv_head": "o"}.get(kind, kind)
    means, hooks, plain = {}, [], copy.deepcopy(model)
    if kind not in ("channel", "attention", "mlp"):
        plain = reference(plain, kind, GONE[kind])  # for OLMo 2's norms
        for copied, original in zip(anatomy(plain).layers, parts.layers, strict=True):
            copied.o.load_state_dict(original.o.state_dict())
    for index, units in GONE[kind].items():
        layer = anatomy(plain).layers[index]
        if kind in ("attention", "mlp"):
            mean = torch.randn(parts.hidden, generator=generator)
            last = layer.o if kind == "attention" else layer.down
            if parts.family in POST_NORM:
                half = len(layer.norms) // 2
                last = list(layer.norms.values())[half - 1 if kind == "attention" else -1]
            hooks.append(last.register_forward_hook(lambda m, a, out, mean=mean: mean.double().expand_as(out)))
        else:
            reads = layer.down if kind == "channel" else layer.o
            which = columns(layer, parts, kind, units)
            width = reads.weight.shape[0 if isinstance(reads, Conv1D) else 1]
            mean = torch.randn(width, generator=generator)

            def put(module, args, which=which, mean=mean):
                x = args[0].clone()
                x[..., which] = mean.double()[which]
                return (x,)

            hooks.append(reads.register_forward_pre_hook(put))
        means[index, role] = mean
    expected = logits(plain)
    with undone(model) as surgery:
        cut(model, kind, keeps(model, kind, GONE[kind]), surgery, means)
        # Means and the sums made of them are float32.
        torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_constant_channels_leave_with_no_error(family):
    model = tiny(family).double()
    layer, gone = anatomy(model).layers[1], [3, 50, 51]
    with torch.no_grad():  # their inputs are a bias alone
        weight = layer.up.weight.T if isinstance(layer.up, Conv1D) else layer.up.weight
        weight[gone] = 0
        layer.up.bias[gone] = torch.tensor([0.7, 1.3, 2.0], dtype=torch.float64)
    seen = []
    with layer.down.register_forward_pre_hook(lambda m, args: seen.append(args[0])):
        whole = logits(model)
    mean = seen[0].flatten(0, -2).mean(dim=0)
    with undone(model) as surgery:
        cut(model, "channel", keeps(model, "channel", {1: gone}), surgery, {(1, "down"): mean.float()})
        torch.testing.assert_close(logits(model), whole, atol=1e-5, rtol=1e-5)


def test_undo_leaves_everything_bit_identical(model):
    modules = [(name, id(module)) for name, module in model.named_modules()]
    attributes = {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for name, module in model.named_modules()
    }
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config, whole = model.config.to_dict(), logits(model)
    with undone(model) as surgery:
        for kind in GONE:
            if kind != "kv_head":  # the same heads can't leave twice
                cut(model, kind, keeps(model, kind, GONE[kind]), surgery)
        if not model.config.model_type.startswith("gemma"):
            cut(model, "hidden", [torch.arange(48)], surgery)
        assert logits(model).isfinite().all()
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    for name, module in model.named_modules():
        now = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        assert now.keys() == attributes[name].keys()
        assert all(now[key] is attributes[name][key] or now[key] == attributes[name][key] for key in now)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), whole)


def in_pieces(model, ids, sizes):
    cache, found = None, []
    with torch.no_grad():
        for piece in ids.split(sizes, dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("kind", GONE)
def test_pieces_and_generation_work_with_the_cache(model, kind):
    with undone(model) as surgery:
        cut(model, kind, keeps(model, kind, GONE[kind]), surgery)
        check_cache(model)


def check_cache(model):
    """Pieces equal the whole, and greedy generation equals doing without a cache, alone and padded in a batch."""
    torch.testing.assert_close(in_pieces(model, IDS, [10, 1, 1, 12]), logits(model), **CLOSE)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 256}
    alone = [model.generate(row[None], **options)[0] for row in (IDS[0, 9:], IDS[1])]
    torch.testing.assert_close(alone[1], model.generate(IDS[1:], use_cache=False, **options)[0])
    if model.config.model_type == "gemma2" and model.dtype == torch.float64:
        return  # its own softmax gives NaN there where padding attends to nothing
    padded = IDS.clone()
    padded[0, :9] = 256
    mask = torch.ones_like(padded)
    mask[0, :9] = 0
    both = model.generate(padded, attention_mask=mask, **options)
    torch.testing.assert_close(both[0, 9:], alone[0])
    torch.testing.assert_close(both[1], alone[1])


@pytest.mark.parametrize("kind", GONE)
def test_settled_models_are_models_of_their_own(model, kind):
    small = copy.deepcopy(model)
    cut(small, kind, keeps(small, kind, GONE[kind]), Surgery())
    expected, before = logits(small), count_parameters(small)
    settle(small)
    torch.testing.assert_close(logits(small), expected, **CLOSE)
    check_cache(small)
    config = small.config
    if kind == "layer":
        assert config.num_hidden_layers == len(anatomy(small).layers) == 2
        assert count_parameters(small) <= before
    assert config.head_dim == anatomy(model).head_dim
    assert (config.num_attention_heads, anatomy(small).kv_heads) == (anatomy(model).heads, anatomy(model).kv_heads)
    for index, layer in enumerate(anatomy(small).layers):
        assert all(getattr(m, "layer_idx", index) == index for m in layer.module.modules())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("gone", [[0], [1, 2], [0, 3]])
def test_layers_that_stay_keep_their_sort(family, gone):
    """Gemma's layers take turns in being local; a short window shows it at work."""
    model = tiny(family, sliding_window=8).double()
    sorts = [sort for index, sort in enumerate(model.config.layer_types) if index not in gone]
    expected = logits(reference(model, "layer", {index: [0] for index in gone}))
    cut(model, "layer", keeps(model, "layer", {index: [0] for index in gone}), Surgery())
    settle(model)
    assert model.config.layer_types == sorts and model.config.num_hidden_layers == len(sorts)
    assert [layer.sliding_window for layer in anatomy(model).layers] == [
        8 if sort == "sliding_attention" else None for sort in sorts
    ]
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    check_cache(model)


def test_regular_shapes_stand_in_the_configuration(model):
    cut(small := copy.deepcopy(model), "channel", [torch.arange(96)] * 4, surgery := Surgery())
    grouped = anatomy(model).kv_heads < anatomy(model).heads
    cut(small, "kv_head", [torch.arange(1 if grouped else 2)] * 4, surgery)
    settle(small)
    parts = anatomy(small)
    assert (parts.heads, parts.kv_heads, parts.intermediate) == (2, 1 if grouped else 2, 96)
    assert parts.head_dim == anatomy(model).head_dim
    assert unit_counts(small, "head") == [2] * 4
    check_cache(small)


def test_another_attention_reaches_layers_whose_heads_were_cut(model):
    model = copy.deepcopy(model).float()
    with undone(model) as surgery:
        cut(model, "kv_head", keeps(model, "kv_head", {0: [1]}), surgery)
        cut(model, "mlp", keeps(model, "mlp", {1: [0]}), surgery)
        whole = logits(model)
        with fv.apply(model, "h2o:keep=1"):
            torch.testing.assert_close(in_pieces(model, IDS, [10, 1, 13]), whole, atol=1e-4, rtol=1e-4)
    with undone(model) as surgery:
        fewer = 1 if anatomy(model).kv_heads < anatomy(model).heads else 2
        cut(model, "kv_head", [torch.arange(fewer)] * 4, surgery)
        with fv.apply(model, "h2o:entries=6"):
            out = model(IDS, use_cache=True)
            assert [int(layer.held().max()) for layer in out.past_key_values.layers] == [6] * 4
            assert out.past_key_values.layers[0].positions.shape[1] == fewer
            assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 27)


def test_what_cannot_be_cut_is_said():
    model = tiny("llama")
    every = keeps(model, "channel", {})
    with undone(model) as surgery:
        with pytest.raises(FoveateError, match="no unit called 'wheel'"):
            cut(model, "wheel", every, surgery)
        with pytest.raises(FoveateError, match="units of 3 layers"):
            cut(model, "channel", every[:3], surgery)
        with pytest.raises(FoveateError, match="every channel of layer 1 would leave"):
            cut(model, "channel", [every[0], every[0][:0], *every[2:]], surgery)
        with pytest.raises(FoveateError, match="unit 200 was to be kept"):
            cut(model, "channel", [torch.tensor([200]), *every[1:]], surgery)
        with pytest.raises(FoveateError, match="every layer would leave"):
            cut(model, "layer", [every[0][:0]] * 4, surgery)
        with pytest.raises(FoveateError, match=r"keep \[2, 1\] query heads"):
            cut(model, "head", keeps(model, "head", {0: [3]}), surgery)
        surgery.set(model.model.layers[2].mlp, "up_proj", nn.Identity())
        with pytest.raises(FoveateError, match="before its parts are converted"):
            cut(model, "channel", keeps(model, "channel", {2: [0]}), surgery)


def test_a_model_of_which_nothing_is_left_is_not_settled():
    model = tiny("llama")
    nothing = [torch.arange(0)] * 4
    cut(model, "attention", nothing, surgery := Surgery())
    cut(model, "mlp", nothing, surgery)
    with pytest.raises(FoveateError, match="every layer would leave"):
        settle(model)
