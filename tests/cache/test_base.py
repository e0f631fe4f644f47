"""Bad input, caches of other kinds, and what a cache really holds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from foveate.cache import PolicyCache
from foveate.errors import FoveateError
from foveate.methods import apply
from foveate.models.caches import cache_bytes, full_cache_bytes
from foveate.models.tiny import tiny

MODEL = tiny("llama")
IDS = torch.arange(3, 43).unsqueeze(0)


@pytest.mark.parametrize(
    "recipe,says",
    [
        ("h2o", "keep=f"),
        ("h2o:keep=0.2,entries=4", "not both"),
        ("h2o:keep=0", "outside"),
        ("h2o:keep=1.5", "outside"),
        ("h2o:keep=nan", "give a finite one"),
        ("h2o:entries=0", "at least 1"),
        ("streaming:entries=4", "at least 5"),
        ("window:keep=0.5,sinks=-1", "negative"),
        ("h2o:keep=0.5,recent=2", "outside"),
        ("h2o:keep=0.5,positions=here", "text, cache, auto"),
        ("window:keep=0.5+h2o:keep=0.5", "only one"),
    ],
)
def test_bad_budgets_get_a_sentence(recipe, says):
    with pytest.raises(FoveateError, match=says), apply(MODEL, recipe):
        pass


def test_two_policies_on_one_model_get_a_sentence():
    with apply(MODEL, "window:keep=0.5"):
        with pytest.raises(FoveateError, match="in force"), apply(MODEL, "h2o:keep=0.5"):
            pass
        assert isinstance(MODEL(IDS, use_cache=True).past_key_values, PolicyCache)


def test_moving_positions_needs_rotary_ones():
    with pytest.raises(FoveateError, match="positions=text"), apply(tiny("gpt2"), "window:keep=0.5,positions=cache"):
        pass


def test_caches_that_come_from_elsewhere():
    filled = MODEL(IDS, use_cache=True).past_key_values
    with apply(MODEL, "window:keep=0.5"):
        with pytest.raises(FoveateError, match="filled before"):
            MODEL(IDS, past_key_values=filled)
        with pytest.raises(FoveateError, match="StaticCache"):
            MODEL(IDS, past_key_values=StaticCache(config=MODEL.config, max_cache_len=64))
        with pytest.raises(FoveateError, match="more than"):
            MODEL(IDS, attention_mask=torch.ones(1, 1, 40, 40), use_cache=True)
        mine = DynamicCache(config=MODEL.config)
        first = MODEL(IDS, past_key_values=mine).past_key_values
        second = MODEL(IDS[:, :1], past_key_values=mine).past_key_values
        assert second is first and second.get_seq_length() == 41
    with pytest.raises(FoveateError, match="inside the"):
        MODEL(IDS[:, :1], past_key_values=first)


def test_generate_runs_on_the_policys_cache():
    with apply(MODEL, "h2o:keep=0.25"):
        out = MODEL.generate(IDS, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, PolicyCache)
    assert int(out.past_key_values.layers[0].held().max()) == 10


def test_bytes_are_those_that_are_held():
    full = MODEL(IDS, use_cache=True).past_key_values
    assert cache_bytes(full) == full_cache_bytes(MODEL, 40)
    with apply(MODEL, "window:keep=0.25"):
        held = MODEL(IDS, use_cache=True).past_key_values
    entries, heads, layers = 10, 2, len(MODEL.model.layers)
    bookkeeping = entries * heads * layers * 4  # positions, int32
    assert cache_bytes(held) == full_cache_bytes(MODEL, entries) + bookkeeping


def test_two_models_at_once_do_not_meddle():
    other = tiny("qwen2")
    with apply(MODEL, "window:entries=6"), apply(other, "h2o:entries=9"):
        a = MODEL(IDS, use_cache=True).past_key_values
        b = other(IDS, use_cache=True).past_key_values
    assert int(a.layers[0].held().max()) == 6 and int(b.layers[0].held().max()) == 9


@torch.no_grad()
def read_on(model, tokens, recipe):
    with apply(model, recipe):
        cache = None
        for _ in range(tokens // 16):
            cache = model(torch.randint(3, 100, (1, 16)), past_key_values=cache, use_cache=True).past_key_values
    return cache


@pytest.mark.parametrize("recipe", ["window:entries=64", "streaming:entries=64", "h2o:entries=64,positions=cache"])
def test_far_past_the_models_positions_where_distances_stay_small(recipe, recwarn):
    read_on(tiny("llama", max_position_embeddings=128), 400, recipe)
    assert not [w for w in recwarn if "positions" in str(w.message)]


@pytest.mark.parametrize("recipe", ["streaming:entries=64,positions=text", "window:entries=200"])
def test_far_past_the_models_positions_gives_a_warning_once(recipe):
    with pytest.warns(UserWarning, match="made for 128.*streaming") as caught:
        read_on(tiny("llama", max_position_embeddings=128), 400, recipe)
    assert len(caught) == 1


def test_learned_positions_end_with_a_sentence():
    model = tiny("gpt2", max_position_embeddings=64)
    with pytest.raises(FoveateError, match="64 learned positions, and token 80"):
        read_on(model, 400, "window:entries=20")
