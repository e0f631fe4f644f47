"""Latent attention: the same numbers from the same bytes, more than grouped queries can say, and smaller latents."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import foveate as fv
from foveate.convert.rotary import ROTARY_FAMILIES
from foveate.errors import FoveateError
from foveate.methods import apply
from foveate.models.caches import cache_bytes, full_cache_bytes
from foveate.models.surgery import cut, undone
from foveate.models.tiny import TINY_FAMILIES, tiny
from foveate.portable import portable_classes
from foveate.portable.latent import LatentAttention
from foveate.portable.parts import build
from foveate.steer.attention import steered_attention
from foveate.steer.memory import remembering

IDS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS).index_put((torch.tensor(0), torch.arange(7)), torch.tensor(0))


pytestmark = pytest.mark.usefixtures("no_grad")


def answers(model, **given):
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256, **given}
    return model.generate(IDS, attention_mask=PADDED, **given)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_whole_latents_change_nothing(family, attention, in_pieces):
    model = tiny(family)
    model.set_attn_implementation(attention)
    before, padded = model(IDS).logits, model(IDS, attention_mask=PADDED).logits
    greedy, beams = answers(model), answers(model, num_beams=3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with apply(model, "latent"):
        assert all(type(layer.attention) is LatentAttention for layer in fv.anatomy(model).layers)
        pieces, cache = in_pieces(model, IDS)
        torch.testing.assert_close(pieces, before, atol=1e-4, rtol=1e-4)
        assert cache_bytes(cache) == full_cache_bytes(model, 40, batch=2)
        again = model(IDS, attention_mask=PADDED).logits
        torch.testing.assert_close(again[PADDED.bool()], padded[PADDED.bool()], atol=1e-4, rtol=1e-4)
        assert torch.equal(answers(model), greedy) and torch.equal(answers(model, num_beams=3), beams)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_attention_window_is_kept(in_pieces):
    model = tiny("mistral", sliding_window=16)
    before = model(IDS).logits
    with apply(model, "latent"):
        torch.testing.assert_close(in_pieces(model, IDS)[0], before, atol=1e-4, rtol=1e-4)


def random_latent():
    """A layer whose heads each read the latents in a way of their own, in float64."""
    sizes = {"hidden": 24, "heads": 4, "kv_heads": 2, "head_dim": 8}
    module = LatentAttention(k_rank=6, v_rank=5, layer_idx=0, biases="qkv", scaling=0.3, **sizes).double()
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter))
    module.frequency = torch.tensor([0, 0, 1, 3, 3, 3])
    module.config = type("Config", (), {"_attn_implementation": "sdpa"})
    return module


def test_the_up_projections_give_each_head_its_own_keys_and_values():
    module, hidden = random_latent(), torch.randn(1, 7, 24, dtype=torch.float64)
    angles = torch.arange(7.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
    turn = torch.polar(torch.ones_like(angles), angles)
    latent = module.k_down(hidden)[0]
    latent = torch.complex(latent[:, :6], latent[:, 6:])
    outs, keys = [], []
    for head in range(4):  # slowly: each key and value is written out, and then rotated
        up = torch.complex(module.k_up[head, 0], module.k_up[head, 1])
        key = torch.zeros(7, 4, dtype=torch.complex128)
        for number, frequency in enumerate(module.frequency):
            key[:, frequency] += up[number] * latent[:, number]
        query = module.q_proj(hidden)[0, :, 8 * head : 8 * head + 8]
        query = torch.complex(query[:, :4], query[:, 4:])
        logits = ((query * turn)[:, None].conj() * (key * turn)[None]).sum(-1).real * 0.3
        weights = logits.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
        outs.append(weights @ (module.v_down(hidden)[0] @ module.v_up[head].T))
        keys.append(key)
    expected = module.o_proj(torch.cat(outs, -1))
    both = torch.cat([angles, angles], -1)[None]
    out, _ = module(hidden, (both.cos(), both.sin()))
    torch.testing.assert_close(out[0], expected)
    # Grouped-query attention would have given heads 0 and 1 the same keys.
    assert not torch.allclose(keys[0], keys[1])


def test_smaller_latents_lose_nothing_where_kv_heads_are_alike(in_pieces):
    model = tiny("qwen2")  # its maps have biases
    dim = fv.anatomy(model).head_dim
    for layer in fv.anatomy(model).layers:
        k, v = layer.k, layer.v
        turned = torch.cat(
            [-k.weight[dim // 2 : dim], k.weight[: dim // 2]]
        )  # i times the first head, at each frequency
        k.weight[dim:] = 0.6 * k.weight[:dim] + 0.8 * turned
        k.bias[dim:] = 0.6 * k.bias[:dim] + 0.8 * torch.cat([-k.bias[dim // 2 : dim], k.bias[: dim // 2]])
        v.weight[dim:], v.bias[dim:] = 2 * v.weight[:dim], 2 * v.bias[:dim]
    before = model(IDS).logits
    with apply(model, "latent:keep=0.5", calibration=IDS[:1]):
        logits, cache = in_pieces(model, IDS)
        torch.testing.assert_close(logits, before, atol=1e-3, rtol=1e-3)
        assert cache_bytes(cache) == full_cache_bytes(model, 40, batch=2) / 2
    with apply(model, "latent:keep=0.25", calibration=IDS[:1]):
        assert not torch.allclose(model(IDS).logits, before, atol=0.1)


def test_directions_of_calibration_text_beat_the_first_ones():
    model = tiny("llama")
    before = model(IDS).logits
    with apply(model, "latent:keep=0.75", calibration=IDS[:1]):
        wise = float((model(IDS).logits - before).square().mean())
        for layer in fv.anatomy(model).layers:  # the same latents at the wrong frequencies
            layer.attention.frequency = layer.attention.frequency.flip(0)
        assert wise < float((model(IDS).logits - before).square().mean())


@pytest.mark.parametrize("recipe", ["latent", "latent:keep=0.5"])
def test_built_again_from_settings(recipe):
    model = tiny("qwen2")
    with apply(model, recipe, calibration=IDS[:1]):
        logits, weights = model(IDS).logits, copy.deepcopy(model.state_dict())
        modules = {path: m for path, m in model.named_modules() if isinstance(m, LatentAttention)}
        thin = {
            "modules": {p: [type(m).__name__, m.settings] for p, m in modules.items()},
            "attributes": {},
            "configs": {},
        }
    fresh = AutoModelForCausalLM.from_config(model.config)
    build(fresh, json.loads(json.dumps(thin)), portable_classes())
    fresh.load_state_dict(weights)
    assert torch.equal(fresh.eval()(IDS).logits, logits)
    static = answers(fresh, cache_implementation="static")
    assert torch.equal(static, answers(fresh))


def test_up_projections_can_be_trained():
    model = tiny("llama")
    with apply(model, "latent"), torch.enable_grad():
        model(IDS, labels=IDS).loss.backward()
        for layer in fv.anatomy(model).layers:
            assert layer.attention.k_up.grad.abs().sum() > 0 and layer.attention.v_up.grad.abs().sum() > 0


def test_steered_attention_finds_the_same_weights(in_pieces):
    model = tiny("llama")

    def sharper(view):
        return view.weights.square() / view.weights.square().sum(-1, keepdim=True)

    def steered():
        with remembering(model) as memory:
            parts = fv.anatomy(model)
            with steered_attention("test", parts, 1, torch.tensor([0, 3]), sharper, memory):
                return in_pieces(model, IDS)[0]

    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        before = steered()
        with apply(model, "latent"):
            torch.testing.assert_close(steered(), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family,recipe,says",
    [
        *[(family, "latent", "take a model of llama") for family in TINY_FAMILIES if family not in ROTARY_FAMILIES],
        ("llama", "latent:keep=0", "outside"),
        ("qwen3", "latent:keep=0.5", "norms its keys"),
        ("llama", "latent+latent", "replaced already"),
        ("llama", "latent+h2o:keep=0.5", "not converted so"),
        ("llama", "h2o:keep=0.5+latent", "in force on this model"),
        ("llama", "low-rank:keep=0.5+latent", "write latent before"),
    ],
)
def test_what_cannot_be_gets_a_sentence(family, recipe, says):
    model = tiny(family)
    before = model(IDS).logits
    with pytest.raises(FoveateError, match=says), apply(model, recipe, calibration=IDS[:1]):
        pass
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("recipe", ["latent", "echo:layers=1"])
def test_heads_that_were_cut_before_stay_so(recipe, in_pieces):
    model = tiny("llama")
    with undone(model) as surgery:
        cut(model, "kv_head", [torch.tensor([1])] * 4, surgery)
        before = model(IDS).logits
        with apply(model, recipe, calibration=IDS[:1]):
            assert {layer.attention.kv_heads for layer in fv.anatomy(model).layers if layer.q is None} == {1}
            logits = in_pieces(model, IDS)[0]
            torch.testing.assert_close(logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
            assert torch.allclose(logits, before, atol=1e-4) is (recipe == "latent")


def test_a_cache_made_before_is_taken():
    model, cache = tiny("llama"), DynamicCache()
    with apply(model, "latent"):
        first = model(IDS[:, :20], past_key_values=cache)
        again = model(IDS[:, 20:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(again, model(IDS).logits[:, 20:], atol=1e-4, rtol=1e-4)
