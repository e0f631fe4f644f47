"""Linear attention: the forms agree with a slow reference; state, masks and positions are right; what is named is."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.errors import FoveateError
from foveate.methods import apply
from foveate.models.caches import cache_bytes
from foveate.models.tiny import TINY_FAMILIES, tiny
from foveate.portable.linear import LigerAttention, LolcatsAttention, PastLayer
from foveate.portable.parts import build

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
RECIPES = [
    "liger:window=5",
    "liger:window=0",
    "liger:window=5,gated=false",
    "liger:window=5,pool=4",
    "lolcats:window=5,tokens=0",
    "lolcats:window=0,feature=6,tokens=0",
]
IDS = torch.randint(3, 120, (2, 151), generator=torch.Generator().manual_seed(1))


def text(length):
    return IDS[:, :length]


def attention(recipe, **changes):
    """One converted attention in float64, its parameters of its own all drawn at random."""
    model = tiny("llama", **changes).double()
    with apply(model, recipe):
        module = model.model.layers[1].self_attn
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("map_q", "map_k", "mix"):
            if hasattr(module, name):
                getattr(module, name).copy_(torch.randn(getattr(module, name).shape, generator=generator))
    return model, module


def slow(module, q, k, v, turned, valid):
    """Token by token and head by head, everything written out: (batch, n, heads x head_dim)."""
    batch, kv_heads, group, n, dim = q.shape
    out = q.new_zeros(batch, n, kv_heads, group, dim)
    for b in range(batch):
        for h in range(kv_heads):
            for g in range(group):
                for t in range(n):
                    if not valid[b, t]:
                        continue
                    window = [i for i in range(max(0, t - module.window + 1), t + 1) if valid[b, i]]
                    window = window if module.window else []
                    scores = [float(turned[0][b, h, g, t] @ turned[1][b, h, i]) / math.sqrt(dim) for i in window]
                    weights = [math.exp(s - max(scores)) for s in scores]
                    near = sum((w * v[b, h, i] for w, i in zip(weights, window, strict=True)), q.new_zeros(dim))
                    if isinstance(module, LolcatsAttention):
                        head = h * group + g
                        share = 1 / (1 + math.exp(-float(module.mix[head])))
                        far, below = q.new_zeros(dim), 0.0
                        for i in range(t - module.window + 1):
                            if valid[b, i]:
                                a = turned[0][b, h, g, t] @ module.map_q[head]
                                c = turned[1][b, h, i] @ module.map_k[h]
                                w = a.softmax(0) @ c.softmax(0) + (-a).softmax(0) @ (-c).softmax(0)
                                far, below = far + w * v[b, h, i], below + w
                        out[b, t, h, g] = (share * near + far) / (share * sum(weights) + below)
                    else:
                        far = q.new_zeros(dim)
                        for i in range(t + 1):
                            if valid[b, i]:
                                decay = q.new_ones(dim)
                                for j in range(i + 1, t + 1):
                                    if valid[b, j] and module.gated:
                                        pooled = k[b, h, j].view(-1, module.pool).mean(-1)
                                        decay *= pooled.sigmoid().pow(1 / 16).repeat_interleave(module.pool)
                                w = (q[b, h, g, t].softmax(0) * k[b, h, i].softmax(0) * decay).sum()
                                far = far + w * v[b, h, i]
                        out[b, t, h, g] = far if not module.window else 0.5 * far + 0.5 * near / sum(weights)
    return out.flatten(2)


def inputs(module, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, n, module.hidden, generator=generator, dtype=torch.float64)
    angle = torch.arange(n)[None, :, None] * torch.rand(module.head_dim // 2, generator=generator, dtype=torch.float64)
    angle = torch.cat([angle, angle], -1)
    return hidden, (angle.cos(), angle.sin())


@pytest.mark.parametrize("n", [1, 5, 6, 33])
@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_chunks_and_steps_are_the_slow_reference(recipe, n, monkeypatch):
    monkeypatch.setattr("foveate.portable.linear.CHUNK", 8)
    monkeypatch.setattr("foveate.portable.linear.GATED_CHUNK", 4)
    monkeypatch.setattr("foveate.portable.linear.SEGMENT", 30)
    _, module = attention(recipe)
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, : n // 3] = False  # padding on the left
    valid[0, n // 2 : n // 2 + 2] = n < 6  # and in the middle
    given = module.projected(*inputs(module, n))
    expected = slow(module, *given, valid)
    whole = module.attended(*given, valid)[0]
    torch.testing.assert_close(whole[valid], expected[valid], atol=1e-10, rtol=1e-10)
    past, steps = None, []
    for t in range(n):
        q, k, v, turned_q, turned_k = (x[..., t : t + 1, :] for x in (*given[:3], *given[3]))
        out, past = module.attended(q, k, v, (turned_q, turned_k), valid[:, t : t + 1], past)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 1)[valid], expected[valid], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_hard_gates_and_large_scores_stay_finite():
    module = attention("liger:window=5")[1]
    q, k, v, turned = module.projected(*inputs(module, 20))
    k = 500 * k
    out = module.attended(q.float(), k.float(), v.float(), tuple(x.float() for x in turned))[0]
    expected = slow(module, q, k, v, turned, torch.ones(2, 20, dtype=torch.bool))
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[4]])
def test_slopes_are_right_and_nothing_looks_ahead(recipe):
    _, module = attention(recipe)
    hidden, position = inputs(module, 9)
    hidden = hidden[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x, position)[0], hidden, atol=1e-6, fast_mode=True)
    slope = torch.autograd.grad(module(hidden, position)[0][0, 4].sum(), hidden)[0][0].abs().sum(-1)
    assert (slope[:5] > 0).all() and (slope[5:] == 0).all()


@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        *((recipe, "llama") for recipe in RECIPES),
        ("lolcats:window=5,tokens=0,layers=0-1", "llama"),
        ("liger:window=5,layers=odd", "mistral"),
        ("liger:window=5,layers=2/3", "qwen2"),
        ("lolcats:window=5,tokens=0,layers=even", "qwen3"),
    ],
)
@torch.no_grad()
def test_pieces_padding_and_generation(recipe, family):
    model, ids = tiny(family), text(60)
    before, names = model(ids).logits, [name for name, _ in model.named_parameters()]
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    with apply(model, recipe):
        whole = model(ids).logits
        cache, pieces = None, []
        for piece in ids.split([20, 1, 1, 9, 29], 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-4, rtol=1e-4)
        assert cache.get_seq_length() == 60

        alone = model(ids[1:, 13:]).logits[0]
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[1, 13:]
            torch.testing.assert_close(padded, alone, atol=2e-4, rtol=1e-4)
        model.set_attn_implementation("sdpa")

        settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
        both = model.generate(ids, attention_mask=mask, **settings)[1, 60:]
        one = model.generate(ids[1:, 13:], **settings)[0, 47:]
        assert both.tolist() == one.tolist()
        slow_one = ids[1:, 13:]
        for _ in range(12):
            slow_one = torch.cat([slow_one, model(slow_one, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert one.tolist() == slow_one[0, 47:].tolist()
        cached = model.generate(ids, num_beams=3, **settings)
        assert cached.tolist() == model.generate(ids, num_beams=3, use_cache=False, **settings).tolist()
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("recipe", ["liger:window=8", "lolcats:window=8,tokens=0"])
@torch.no_grad()
def test_the_state_does_not_grow_while_generating(recipe):
    model = tiny("llama")
    with apply(model, recipe):
        sizes = {cache_bytes(model(text(n), use_cache=True).past_key_values) for n in (1, 7, 150)}
        out = model.generate(
            text(20),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    assert out.past_key_values.get_seq_length() == 59
    assert sizes == {cache_bytes(out.past_key_values)}
    assert all(isinstance(layer, PastLayer) for layer in out.past_key_values.layers)


@pytest.mark.parametrize("layers", ["even", "odd", "2-3"])
@torch.no_grad()
def test_beside_layers_with_a_window_of_their_own(layers):
    model, ids = tiny("mistral", sliding_window=16), text(60)
    with apply(model, f"liger:window=5,layers={layers}"):
        whole = model(ids).logits
        cache, pieces = None, []
        for piece in ids.split([20, 1, 9, 30], 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_batches_of_the_cache_are_selected_and_repeated():
    model, ids = tiny("llama"), text(30)
    with apply(model, "lolcats:window=5,tokens=0,layers=odd"):
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        out = model(IDS[1:, 30:33].repeat(2, 1), past_key_values=cache).logits
        torch.testing.assert_close(out[1], model(IDS[1:, :33]).logits[0, 30:], atol=2e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="can't forget"):
            cache.crop(-1)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, atol=2e-4, rtol=1e-4)


def test_a_cache_that_can_not_hold_the_state_is_refused():
    model, ids = tiny("llama"), text(10)
    cache = model(ids, use_cache=True).past_key_values
    with apply(model, "liger"):
        fresh = model(ids, use_cache=True).past_key_values
        model(ids, past_key_values=fresh)
        with pytest.raises((ValueError, FoveateError)):
            model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="begin with an empty DynamicCache"):
            model.generate(ids, max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("family", [f for f in TINY_FAMILIES if f not in FAMILIES])
def test_other_families_get_a_sentence(family):
    for recipe in ("liger", "lolcats"):
        with (
            pytest.raises(FoveateError, match="can't be made linear"),
            apply(tiny(family), recipe, calibration=IDS[:1]),
        ):
            pass


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("liger:layers=0-9", "can't be read for 4 layers"),
        ("liger:layers=x", "can't be read"),
        ("liger:layers=2-1", "can't be read"),
        ("liger:pool=5", "does not divide"),
        ("liger:window=-1", "must be 0 or more"),
        ("lolcats:steps=0", "above 0"),
        ("liger+liger", "a LigerAttention already"),
    ],
)
def test_mistakes_get_a_sentence(recipe, words):
    with pytest.raises(FoveateError, match=words), apply(tiny("llama"), recipe):
        pass


def test_layers_are_those_that_are_named_and_attend():
    model = tiny("llama")
    with apply(model, "drop-attention:keep=0.75+liger:layers=1-3", calibration=IDS[:1]):
        kinds = [type(layer.self_attn).__name__ for layer in model.model.layers]
    dropped = kinds.index("NoAttention")
    assert [kind == "LigerAttention" for kind in kinds] == [i >= 1 and i != dropped for i in range(4)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["liger:window=5,layers=odd", "lolcats:window=5,tokens=0,feature=6"])
@torch.no_grad()
def test_a_stock_model_is_built_anew_from_settings_and_weights(family, recipe):
    model, ids = tiny(family), text(40)
    anew = type(model)(model.config).eval()
    with apply(model, recipe):
        expected, state = model(ids).logits, model.state_dict()
        kinds = (LigerAttention, LolcatsAttention)
        modules = {
            name: [type(module).__name__, module.settings]
            for name, module in model.named_modules()
            if isinstance(module, kinds)
        }
    build(anew, {"modules": modules, "heads": {}}, {kind.__name__: kind for kind in kinds})
    anew.load_state_dict(state)
    assert torch.equal(anew(ids).logits, expected)
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    assert anew.generate(ids, **settings).shape == (2, 45)  # on transformers' own cache
