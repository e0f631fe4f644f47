"""Codings: entries are written once, take the bytes they say, and come back near to what they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.cache.coders import CODINGS
from foveate.cache.coders.base import pack_bits, unpack_bits
from foveate.cache.coders.product import _groups
from foveate.cache.packed import Packed
from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.models.anatomy import anatomy
from foveate.models.caches import cache_bytes
from foveate.models.tiny import TINY_FAMILIES, tiny, tiny_tokenizer

IDS = torch.randint(3, 120, (1, 60), generator=torch.Generator().manual_seed(1))
TEXT = torch.randint(3, 120, (1, 96), generator=torch.Generator().manual_seed(2))
MODEL = tiny("llama")


@given(bits=st.integers(1, 8), seed=st.integers(0, 99), rows=st.integers(1, 5))
def test_bits_come_back(bits, seed, rows):
    numbers = torch.randint(0, 2**bits, (rows, 24), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(numbers, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, 3 * bits)
    assert torch.equal(unpack_bits(packed, bits), numbers)


@torch.no_grad()
def read(recipe, pieces, model=MODEL, ids=IDS):
    cache, logits, start = None, [], 0
    with apply(model, recipe, calibration=TEXT):
        for size in pieces:
            out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_more_bits_are_nearer_to_the_full_cache(family):
    model = tiny(family)
    pieces = [40, 1, 1, 18]
    full, _ = read("full", pieces, model)
    errors = []
    for bits in (2, 4, 8):
        ours, cache = read(f"window:keep=1,code=groups(bits={bits},group=8)", pieces, model)
        assert torch.equal(ours[:, :40], full[:, :40]) or (ours[:, :40] - full[:, :40]).abs().max() < 1e-4
        errors.append(float((ours - full)[:, 40:].norm() / full[:, 40:].norm()))
        assert isinstance(cache.layers[0].entries, Packed)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.03


def test_entries_are_written_once():
    recipe = "h2o:entries=30,code=groups(bits=3,group=8)"

    def codes(pieces):
        layer = read(recipe, pieces)[1].layers[1]
        return dict(zip(layer.positions[0, 0].tolist(), layer.padded.key_codes[0, 0], strict=True))

    first, last = codes([40]), codes([40] + [1] * 20)
    both = first.keys() & last.keys() - set(range(4))
    assert len(both) > 5 and all(torch.equal(first[p], last[p]) for p in both)


def test_they_take_the_bytes_they_say():
    parts = anatomy(MODEL)
    _, cache = read("window:keep=1,code=groups(bits=4,group=16)", [60])
    heads = parts.kv_heads * len(parts.layers)
    coded = 56 * heads * (2 * parts.head_dim // 2 + 1 + 4 * parts.head_dim // 16)
    sinks = 4 * heads * 2 * parts.head_dim * 2
    runs, counts = 8 * heads, 4 * heads
    assert cache_bytes(cache) == coded + sinks + runs + counts


@pytest.mark.parametrize(
    "recipe",
    [
        "h2o:keep=0.5,code=groups(bits=4,group=8)",
        "streaming:keep=0.5,code=groups(bits=4,group=8)",
        "window:keep=0.4,budget=pyramid,code=groups(bits=8,group=8)",
        "zipvl:mass=0.6,code=tiers(best=groups(group=8),rest=groups(bits=2,group=8))",
        "zipvl:entries=20,code=tiers(best=groups(group=8),rest=groups(bits=2,group=8))",
    ],
)
def test_generate_works_as_it_is(recipe):
    short = IDS[:, 9:]
    batch = torch.cat([IDS, torch.cat([IDS[:, :9] * 0, short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :9] = 0
    with apply(MODEL, recipe, calibration=TEXT):
        for how in ({}, {"num_beams": 3}):
            how = how | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            both = MODEL.generate(batch, attention_mask=mask, **how)
            for row, ids in ((0, IDS), (1, short)):
                assert torch.equal(both[row, -6:], MODEL.generate(ids, **how)[0, -6:])


def test_important_entries_have_more_bits():
    _, cache = read("zipvl:mass=0.6,code=tiers(best=groups(group=8),rest=groups(bits=2,group=8))", [58, 1, 1])
    shares = [float(layer.padded.tier.float().mean()) for layer in cache.layers]
    assert all(0.1 < share < 0.95 for share in shares) and len(set(shares)) > 1, shares
    _, all_high = read("zipvl:mass=1,code=tiers(best=groups(group=8),rest=groups(bits=2,group=8))", [58, 1, 1])
    assert all(int(layer.padded.tier.sum()) == 0 for layer in all_high.layers)
    assert cache_bytes(cache) < cache_bytes(all_high)


def test_text_form():
    recipe = Recipe.of("h2o:keep=0.2,code=groups(bits=3),budget=pyramid")
    assert str(recipe) == "h2o:keep=0.2,budget=pyramid,code=groups(bits=3)"
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    "recipe,says",
    [
        ("window:keep=1,code=group", "did you mean groups"),
        ("window:keep=1,code=groups(bits=9)", "1 to 8"),
        ("window:keep=1,code=groups(group=7)", "does not divide"),
        ("zipvl:code=groups(bits=4)", "two tiers"),
        ("zipvl:mass=0", "outside"),
    ],
)
def test_bad_codes_get_a_sentence(recipe, says):
    with pytest.raises(FoveateError, match=says), apply(MODEL, recipe, calibration=TEXT):
        pass


def test_codings_say_what_they_are():
    for name, cls in CODINGS.all().items():
        assert cls.claim and cls.__doc__, name


def test_product_refuses_heads_that_hold_different_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    recipe = "h2o:keep=0.5,code=product(share=0.2)"
    with pytest.raises(FoveateError, match="different tokens"), apply(MODEL, recipe, **FITTED):
        cache = MODEL(IDS[:, :40], use_cache=True).past_key_values
        MODEL(IDS[:, 40:], past_key_values=cache, use_cache=True)


FITTED = {"calibration": TEXT.repeat(1, 8)[:, torch.randperm(768)], "tokenizer": tiny_tokenizer()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_more_product_bytes_are_nearer_to_the_full_cache(family, tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    model, errors, sizes = tiny(family), [], []
    with torch.no_grad():
        full = model(IDS, use_cache=True).logits[:, 40:]
    for share in (0.05, 0.2, 0.8):
        recipe = f"aged:fresh=4,code=tiers(rest=product(share={share}),best=groups(group=8))"
        with apply(model, recipe, **FITTED), torch.no_grad():
            cache = model(IDS[:, :40], use_cache=True).past_key_values
            sizes.append(cache_bytes(cache))
            ours = model(IDS[:, 40:], past_key_values=cache, use_cache=True).logits
        errors.append(float((ours - full).norm() / full.norm()))
    assert errors[0] > errors[1] > errors[2] and sizes[0] < sizes[1] < sizes[2]


def test_old_entries_are_coded_once_and_step_by_step_is_the_same_in_a_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    recipe = "aged:fresh=6,code=tiers(rest=product(share=0.2),best=groups(group=8))"
    short = IDS[:, 9:]
    batch = torch.cat([IDS, torch.cat([IDS[:, :9] * 0, short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :9] = 0
    with apply(MODEL, recipe, **FITTED), torch.no_grad():
        both = MODEL.generate(batch, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for row, ids in ((0, IDS), (1, short)):
            assert torch.equal(both[row, -12:], MODEL.generate(ids, max_new_tokens=12, do_sample=False)[0, -12:])
        cache = MODEL(IDS[:, :40], use_cache=True).past_key_values
        before = cache.layers[1].padded.key_codes[0, :, 4:30].clone()
        for at in range(40, 60):
            cache = MODEL(IDS[:, at : at + 1], past_key_values=cache, use_cache=True).past_key_values
        layer = cache.layers[1].padded
        assert torch.equal(layer.key_codes[0, :, 4:30], before)
        assert layer.tier[0, 0].tolist() == [1] * 54 + [0] * 6


@given(seed=st.integers(0, 50), count=st.integers(1, 12))
def test_groups_share_the_bits(seed, count):
    cost = (3 * torch.randn(40, generator=torch.Generator().manual_seed(seed))).exp().double().sort(descending=True)[0]
    sizes = _groups(cost, count)
    assert len(sizes) == count and min(sizes) >= 1 and sum(sizes) <= 40
