"""Echo: the layer that attends alike is found, its queries and keys go, and the rest is as one attention twice."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import foveate as fv
from foveate.convert.echo import attention_similarity, blocks, most_similar
from foveate.convert.rotary import ROTARY_FAMILIES
from foveate.errors import FoveateError
from foveate.methods import apply
from foveate.models.caches import cache_bytes, full_cache_bytes
from foveate.models.tiny import TINY_FAMILIES, tiny
from foveate.portable import portable_classes
from foveate.portable.echo import EchoAttention, SharingAttention
from foveate.portable.parts import build

IDS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS).index_put((torch.tensor(0), torch.arange(7)), torch.tensor(0))


pytestmark = pytest.mark.usefixtures("no_grad")


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def with_an_echo(family, at, **config):
    """A model in which layer `at` attends just as the one before: that one adds nothing, and the maps are its own."""
    model = tiny(family, num_hidden_layers=5, **config)
    before, layer = fv.anatomy(model).layers[at - 1], fv.anatomy(model).layers[at]
    before.o.weight.zero_(), before.down.weight.zero_()
    layer.module.input_layernorm.load_state_dict(before.module.input_layernorm.state_dict())
    for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
        if hasattr(layer.attention, name):
            getattr(layer.attention, name).load_state_dict(getattr(before.attention, name).state_dict())
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family,at", [(family, 2 + i % 2) for i, family in enumerate(ROTARY_FAMILIES)])
def test_a_layer_that_attends_as_the_one_before_echoes_it_without_loss(family, at, attention, in_pieces):
    model = with_an_echo(family, at)
    model.set_attn_implementation(attention)
    full, whole, layer = model(IDS), parameters(model), fv.anatomy(model).layers[at].attention
    padded = model(IDS, attention_mask=PADDED).logits
    given = {"attention_mask": PADDED, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 256}
    greedy, beams = model.generate(IDS, **given), model.generate(IDS, num_beams=3, **given)
    parts = [m for name, m in layer.named_children() if name in ("q_proj", "k_proj", "q_norm", "k_norm")]
    with apply(model, "echo:layers=1", calibration=IDS[:1]):
        layers = [layer.attention for layer in fv.anatomy(model).layers]
        assert type(layers[at]) is EchoAttention and type(layers[at - 1]) is SharingAttention
        assert parameters(model) == whole - sum(p.numel() for m in parts for p in m.parameters())
        logits, cache = in_pieces(model, IDS)
        torch.testing.assert_close(logits, full.logits, atol=1e-4, rtol=1e-4)
        saved = 40 * 2 * 4 * (layer.k_proj.out_features - layer.k_proj.out_features // layer.head_dim)
        assert cache_bytes(cache) == full_cache_bytes(model, 40, batch=2) - saved
        again = model(IDS, attention_mask=PADDED).logits
        torch.testing.assert_close(again[PADDED.bool()], padded[PADDED.bool()], atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(IDS, **given), greedy)
        assert torch.equal(model.generate(IDS, num_beams=3, **given), beams)
        assert not layers[at - 1]._shared  # nothing is held between forwards
    assert parameters(model) == whole and torch.equal(model(IDS).logits, full.logits)


def test_an_echo_is_the_weights_of_its_source_on_its_own_values():
    model = tiny("llama", num_hidden_layers=6).double()
    model.set_attn_implementation("eager")
    seen = {}
    with apply(model, "echo:layers=3", calibration=IDS[:1]):
        attentions = [layer.attention for layer in fv.anatomy(model).layers]
        hooks = [
            attention.register_forward_hook(
                lambda m, args, kwargs, out, i=i: seen.update({i: (kwargs["hidden_states"], *out)}), with_kwargs=True
            )
            for i, attention in enumerate(attentions)
        ]
        model(IDS)
        for hook in hooks:
            hook.remove()
        echoes = {i: m.settings["source"] for i, m in enumerate(attentions) if isinstance(m, EchoAttention)}
        assert len(echoes) == 3
        for i, source in echoes.items():
            hidden, out, _ = seen[i]
            values = attentions[i].v_proj(hidden).unflatten(-1, (2, 16)).repeat_interleave(2, dim=2)
            expected = torch.einsum("bhqk,bkhd->bqhd", seen[source][2], values).flatten(2)
            torch.testing.assert_close(out, attentions[i].o_proj(expected))


def test_similarity_is_the_cosine_of_attention_weights():
    model = tiny("llama").double()
    model.set_attn_implementation("eager")
    weights = model(IDS[:1], output_attentions=True).attentions
    expected = torch.cosine_similarity(weights[1], weights[3], dim=-1).mean()
    model.set_attn_implementation("sdpa")
    found = attention_similarity(model, fv.anatomy(model).layers, IDS[:1])
    torch.testing.assert_close(found[1, 3], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.diagonal(), torch.ones(4, dtype=torch.float64))
    assert model.config._attn_implementation == "sdpa"


def test_blocks_echo_their_first_layer():
    assert blocks({2, 5, 4, 8}) == {2: 1, 4: 3, 5: 3, 8: 7}


def test_the_most_similar_layers_are_picked_with_their_blocks_in_mind():
    layers = fv.anatomy(tiny("llama", num_hidden_layers=6)).layers
    similarity = torch.zeros(6, 6)
    similarity[1, 2], similarity[2, 3], similarity[3, 4] = 0.9, 0.8, 0.7
    assert most_similar(similarity, layers, [1, 2, 3, 4], 1) == {2: 1}
    # Layer 3 is like layer 2, but as an echo it would follow layer 1, and it is not like that one.
    assert most_similar(similarity, layers, [1, 2, 3, 4], 2) == {2: 1, 4: 3}


def test_an_attention_window_is_kept(in_pieces):
    model = with_an_echo("mistral", 2, sliding_window=16)
    before = model(IDS).logits
    with apply(model, "echo:layers=1", calibration=IDS[:1]):
        torch.testing.assert_close(in_pieces(model, IDS)[0], before, atol=1e-4, rtol=1e-4)


def test_built_again_from_settings():
    model = tiny("qwen3", num_hidden_layers=6)
    with apply(model, "echo:layers=3", calibration=IDS[:1]):
        logits, weights = model(IDS).logits, copy.deepcopy(model.state_dict())
        kinds = (EchoAttention, SharingAttention)
        modules = {path: m for path, m in model.named_modules() if isinstance(m, kinds)}
        thin = {
            "modules": {p: [type(m).__name__, m.settings] for p, m in modules.items()},
            "attributes": {},
            "configs": {},
        }
        twin = copy.deepcopy(model)  # its echoes follow its own layers
    fresh = AutoModelForCausalLM.from_config(model.config)
    build(fresh, json.loads(json.dumps(thin)), portable_classes())
    fresh.load_state_dict(weights)
    assert torch.equal(fresh.eval()(IDS).logits, logits) and torch.equal(twin(IDS).logits, logits)
    given = {"attention_mask": PADDED, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 256}
    assert torch.equal(fresh.generate(IDS, cache_implementation="static", **given), fresh.generate(IDS, **given))


def test_an_echo_trains_its_source():
    model = with_an_echo("llama", 2)
    with apply(model, "echo:layers=1", calibration=IDS[:1]), torch.enable_grad():
        model(IDS, labels=IDS).loss.backward()
    # The source adds nothing itself (its output map is zero): what its queries learn comes by the echo.
    assert fv.anatomy(model).layers[1].q.weight.grad.abs().sum() > 0


def test_a_source_that_did_not_run_is_an_error():
    model = with_an_echo("llama", 2)
    with apply(model, "echo:layers=1", calibration=IDS[:1]):
        source = fv.anatomy(model).layers[1].module
        source.forward = lambda hidden_states, *args, **kwargs: hidden_states
        with pytest.raises(RuntimeError, match="layer 2 echoes the attention of layer 1, which has not run"):
            model(IDS)
        del source.forward


@pytest.mark.parametrize(
    "family,recipe,says",
    [
        *[(f, "echo:layers=1", "take a model of llama") for f in TINY_FAMILIES if f not in ROTARY_FAMILIES],
        ("llama", "echo:layers=0", "at least|number of layers"),
        ("llama", "echo:layers=3", "at most 2"),
        ("llama", "echo:layers=1+h2o:keep=0.5", "not converted so"),
        ("llama", "h2o:keep=0.5+echo:layers=1", "in force on this model"),
    ],
)
def test_what_cannot_be_gets_a_sentence(family, recipe, says):
    model = tiny(family)
    before = model(IDS).logits
    with pytest.raises(FoveateError, match=says), apply(model, recipe, calibration=IDS[:1]):
        pass
    assert torch.equal(model(IDS).logits, before)


def test_with_what_was_pruned_before(in_pieces):
    model = tiny("llama", num_hidden_layers=6)
    with apply(model, "drop-attention:keep=0.8+echo:layers=2", calibration=IDS[:1]):
        names = [type(layer.attention).__name__ for layer in fv.anatomy(model).layers]
        assert names.count("NoAttention") == 1 and names.count("EchoAttention") == 2
        torch.testing.assert_close(in_pieces(model, IDS)[0], model(IDS).logits, atol=1e-4, rtol=1e-4)
