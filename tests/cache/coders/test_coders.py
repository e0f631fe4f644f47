"""Codings: entries are written once, take the bytes they say, and come back near to what they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.cache.coders import CODINGS
from foveate.cache.coders.base import pack_bits, unpack_bits
from foveate.cache.coders.product import _groups
from foveate.cache.packed import Entries, Packed
from foveate.errors import FoveateError
from foveate.methods import Recipe, Target, apply
from foveate.models.anatomy import anatomy
from foveate.models.caches import cache_bytes
from foveate.models.tiny import TINY_FAMILIES, tiny, tiny_tokenizer

IDS = torch.randint(3, 120, (1, 60), generator=torch.Generator().manual_seed(1))
TEXT = torch.randint(3, 120, (1, 96), generator=torch.Generator().manual_seed(2))
MODEL = tiny("llama")
# In float32 a batch rounds differently, and an entry halfway between two codewords may take the other one.
EXACT = tiny("llama").double()
THREE = "tiers(best=groups(bits=8,group=8),middle=groups(bits=4,group=8),rest=groups(bits=2,group=16))"


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
        f"aged:fresh=4,middle=9,code={THREE}",
    ],
)
def test_generate_works_as_it_is(recipe):
    short = IDS[:, 9:]
    batch = torch.cat([IDS, torch.cat([IDS[:, :9] * 0, short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :9] = 0
    with apply(EXACT, recipe, calibration=TEXT):
        for how in ({}, {"num_beams": 3}):
            how = how | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            both = EXACT.generate(batch, attention_mask=mask, **how)
            for row, ids in ((0, IDS), (1, short)):
                assert torch.equal(both[row, -6:], EXACT.generate(ids, **how)[0, -6:])


def test_important_entries_have_more_bits():
    _, cache = read("zipvl:mass=0.6,code=tiers(best=groups(group=8),rest=groups(bits=2,group=8))", [58, 1, 1])
    shares = [float(layer.padded.tier.float().mean()) for layer in cache.layers]
    assert all(0.1 < share < 0.95 for share in shares) and len(set(shares)) > 1, shares
    _, all_high = read("zipvl:mass=1,code=tiers(best=groups(group=8),rest=groups(bits=2,group=8))", [58, 1, 1])
    assert all(int(layer.padded.tier.sum()) == 0 for layer in all_high.layers)
    assert cache_bytes(cache) < cache_bytes(all_high)


@given(seed=st.integers(0, 99), entries=st.integers(0, 30))
def test_tiers_are_what_their_codes_are(seed, entries):
    code = Recipe.of(f"aged:fresh=4,middle=9,code={THREE}").methods[0].code
    coder = code.coder(Target(MODEL, None, lambda n=0: TEXT, tiny_tokenizer))
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 2, entries, 16, generator=generator, dtype=torch.float64)
    positions = torch.arange(entries, dtype=torch.int32).expand(2, 2, -1) + 4
    tier = torch.randint(0, 3, (2, 2, entries), generator=generator, dtype=torch.uint8)
    ours = coder.decode(1, *coder.encode(1, keys, values, positions, tier), positions, tier, torch.float64)
    each = [
        c.decode(1, *c.encode(1, keys, values, positions, None), positions, None, torch.float64) for c in coder.coders
    ]
    for mine, of_tier in zip(ours, zip(*each, strict=True), strict=True):
        expected = torch.stack(of_tier).gather(0, tier.long()[None, ..., None].expand(1, *mine.shape))[0]
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    # and at rest
    codes = coder.encode(1, keys, values, positions, tier)
    held = Packed.of(Entries(*ours, positions, None, *codes, tier), coder, 1)
    back = held.unpack(coder, torch.float64, 1)
    assert torch.equal(back.tier, tier) and torch.equal(back.keys, ours[0]) and torch.equal(back.values, ours[1])
    said = [int(x.expand(tier.shape).sum()) for x in coder.lengths(1, tier)]
    assert [held.key_codes.numel(), held.value_codes.numel()] == said


def test_entries_grow_old():
    recipe = f"aged:fresh=6,middle=10,code={THREE}"
    for pieces in ([40] + [1] * 20, [60]):
        _, cache = read(recipe, pieces)
        layer = cache.layers[2].padded
        assert layer.tier[0].tolist() == [[2] * 44 + [1] * 10 + [0] * 6] * 2
        assert len(cache.layers[2].entries.tier) == 2 * 3  # held by runs: three in each KV head
    error = (layer.values - read("full", [60])[1].layers[2].values).norm(dim=-1)[0].mean(0)
    assert error[-6:].mean() < error[-16:-6].mean() < error[4:-16].mean() / 2
    sizes = [
        cache_bytes(read(f"aged:fresh={n},middle={m},code={THREE}", [60])[1]) for n, m in ((6, 10), (6, 30), (26, 10))
    ]
    assert sizes[0] < sizes[1] < sizes[2]


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
        (f"zipvl:code={THREE}", "two tiers"),
        (f"aged:code={THREE}", "give both"),
        ("aged:middle=9,code=tiers(rest=groups(bits=2))", "give both"),
        ("aged:fresh=-1", "negative"),
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


MIXED = torch.randperm(768, generator=torch.Generator().manual_seed(3))
FITTED = {"calibration": TEXT.repeat(1, 8)[:, MIXED], "tokenizer": tiny_tokenizer()}


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
    with apply(EXACT, recipe, **FITTED), torch.no_grad():
        both = EXACT.generate(
            batch, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
        )
        for row, ids in ((0, IDS), (1, short)):
            assert torch.equal(
                both[row, -12:], EXACT.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, -12:]
            )
        cache = EXACT(IDS[:, :40], use_cache=True).past_key_values
        before = cache.layers[1].padded.key_codes[0, :, 4:30].clone()
        for at in range(40, 60):
            cache = EXACT(IDS[:, at : at + 1], past_key_values=cache, use_cache=True).past_key_values
        layer = cache.layers[1].padded
        assert torch.equal(layer.key_codes[0, :, 4:30], before)
        assert layer.tier[0, 0].tolist() == [1] * 54 + [0] * 6


@given(seed=st.integers(0, 50), count=st.integers(1, 12))
def test_groups_share_the_bits(seed, count):
    cost = (3 * torch.randn(40, generator=torch.Generator().manual_seed(seed))).exp().double().sort(descending=True)[0]
    sizes = _groups(cost, count)
    assert len(sizes) == count and min(sizes) >= 1 and sum(sizes) <= 40
