"""LoLCATs: attention transfer learns, layer by layer, from the model as it was; what it learned is kept."""

from __future__ import annotations

import pytest
import torch

from foveate.convert.lolcats import Lolcats, transfer, transfer_errors, untrained
from foveate.methods import Target, apply
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.portable.linear import LolcatsAttention

IDS = torch.randint(3, 60, (1, 300), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))


def target(model):
    return Target(model, None, lambda length=2048: IDS, tiny_tokenizer)


def test_the_error_falls_in_every_layer_and_the_model_stays_as_it_was():
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = untrained(target(model), window=8, feature=None, layers="all", who="lolcats")
    begun = transfer_errors(model, modules, IDS)
    seen = []
    transfer(model, modules, IDS, steps=40, lr=0.01, progress=lambda done, note: seen.append((done, note)))
    learned = transfer_errors(model, modules, IDS)
    assert sorted(begun) == [0, 1, 2, 3] and all(learned[i][0] < 0.9 * begun[i][0] for i in begun)
    assert seen[-1][0] == 1 and "relative error" in seen[-1][1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (
        not model.model.layers[0].self_attn._forward_hooks
        and not model.model.layers[0].self_attn.o_proj._forward_pre_hooks
    )


@torch.no_grad()
def test_the_error_is_that_of_the_answers_of_softmax_attention():
    model = tiny("qwen3")
    modules = untrained(target(model), window=8, feature=None, layers="2", who="lolcats")
    hidden = model(IDS, output_hidden_states=True).hidden_states[2]
    layer = model.model.layers[2]
    position = model.model.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
    normed = layer.input_layernorm(hidden)
    q, k, v, (q_turned, k_turned) = modules[2].projected(normed, position)
    scores = q_turned @ k_turned.mT.unsqueeze(2) / layer.self_attn.head_dim**0.5
    mask = torch.ones(300, 300, dtype=torch.bool).triu(1)
    answers = scores.masked_fill(mask, -torch.inf).softmax(-1) @ v.unsqueeze(2)
    mine = modules[2].attended(q, k, v, (q_turned, k_turned))[0]
    expected = (mine - answers.permute(0, 3, 1, 2, 4).flatten(2)).square().mean()
    found = transfer_errors(model, modules, IDS)[2]
    assert found == pytest.approx((float(expected), float(answers.square().mean())), rel=1e-3)


def test_what_was_learned_is_read_back():
    model, calls = tiny("llama"), []
    watch = model.model.register_forward_hook(lambda *_: calls.append(1))
    recipe = "lolcats:window=8,steps=3,layers=odd"
    with apply(model, recipe, calibration=IDS):
        assert [type(layer.self_attn).__name__ for layer in model.model.layers][::2] == ["LlamaAttention"] * 2
        first = model(IDS).logits
        maps = [layer.self_attn for layer in model.model.layers[1::2]]
        assert all(isinstance(m, LolcatsAttention) and float(m.mix.abs().sum()) > 0 for m in maps)
    taught = len(calls)
    assert taught == 2  # one pass over the text, and the forward above
    with apply(model, recipe, calibration=IDS):
        assert len(calls) == taught
        torch.testing.assert_close(model(IDS).logits, first)
    with apply(model, recipe.replace("8", "9"), calibration=IDS):
        assert len(calls) > taught + 1
    watch.remove()


@pytest.mark.parametrize("feature", [4, 16, 24])
@torch.no_grad()
def test_a_window_that_holds_all_is_softmax_attention(feature):
    model = tiny("llama")
    full = model(IDS).logits
    with apply(model, f"lolcats:window=300,tokens=0,feature={feature}"):
        torch.testing.assert_close(model(IDS).logits, full, atol=2e-4, rtol=1e-4)
    with apply(model, "lolcats:window=299,tokens=0"):
        near = model(IDS).logits
        torch.testing.assert_close(near[:, :299], full[:, :299], atol=2e-4, rtol=1e-4)
        assert (near[:, 299] - full[:, 299]).abs().max() > 1e-4


def test_a_model_in_half_precision_keeps_its_dtype():
    model = tiny("llama").to(torch.bfloat16)
    with apply(model, Lolcats(window=8, steps=1), calibration=IDS):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        out = model(IDS, use_cache=True)
        assert out.logits.isfinite().all() and out.past_key_values.layers[0].memory.dtype == torch.float32
