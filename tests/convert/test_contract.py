"""The contract of every converter, on a tiny model of every family that it knows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import foveate as fv
from foveate.convert import Converter
from foveate.convert.linear import FAMILIES as LINEAR_FAMILIES
from foveate.convert.rotary import ROTARY_FAMILIES
from foveate.errors import FoveateError
from foveate.measure.weights import weight_bytes
from foveate.methods import METHODS, apply
from foveate.models.saved import save
from foveate.models.tiny import TINY_FAMILIES, tiny


@dataclass(frozen=True)
class Case:
    """How a converter is tried.

    Attributes:
        small: fields that make the model smaller.
        neutral: fields at which it computes what it did; None: it has none.
        families: those that it works on.
        sheds: "parameters" or "bytes" where they fall with `small`; None: neither is promised.
    """

    small: str
    neutral: str | None = None
    families: tuple[str, ...] = TINY_FAMILIES
    sheds: str | None = "parameters"


CASES = {
    "blockwise": Case("bits=4,block=32", sheds="bytes"),
    "echo": Case("layers=2", families=ROTARY_FAMILIES),
    "latent": Case("keep=0.5", "keep=1", ROTARY_FAMILIES[:3], sheds=None),  # its cache falls; Qwen 3 has no smaller one
    "liger": Case("window=8", families=LINEAR_FAMILIES, sheds=None),
    "lolcats": Case("window=8,tokens=0", "window=64,tokens=0", LINEAR_FAMILIES, sheds=None),
    "low-rank": Case("keep=0.6", "keep=1"),
    "recursive": Case("rank=4", "rank=64"),
}

PAIRS = [(name, family) for name, case in CASES.items() for family in case.families]
NEUTRAL = [(name, family) for name, family in PAIRS if CASES[name].neutral is not None]
IDS = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(1))
LONG = torch.randint(3, 120, (1, 96), generator=torch.Generator().manual_seed(3))


def recipe(name: str, fields: str | None) -> str:
    return f"{name}:{fields}"


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def step_through(model, ids, pieces):
    cache, logits, start = None, [], 0
    for size in pieces:
        out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + size
        logits.append(out.logits)
    return torch.cat(logits, 1)


def test_the_contract_knows_every_converter():
    ours = {name for name, cls in METHODS.all().items() if issubclass(cls, Converter)}
    assert {name for name in ours if METHODS.all()[name].__module__.startswith("foveate.")} == set(CASES)


@pytest.mark.parametrize("name, family", NEUTRAL)
def test_the_neutral_setting_is_the_model_itself(name, family):
    model = tiny(family)
    full = step_through(model, IDS, [40])
    with apply(model, recipe(name, CASES[name].neutral), calibration=LONG):
        for pieces in ([40], [17, 13, 1, 9]):
            torch.testing.assert_close(step_through(model, IDS, pieces), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, family", PAIRS)
def test_it_is_smaller_reads_in_pieces_and_leaves_nothing_behind(name, family):
    model = tiny(family)

    def trace():
        hooks = [(n, len(x._forward_hooks), len(x._forward_pre_hooks)) for n, x in model.named_modules()]
        return hooks, model.config.to_dict(), {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}

    before, full, many, size = trace(), step_through(model, IDS, [40]), parameters(model), weight_bytes(model)
    with apply(model, recipe(name, CASES[name].small), calibration=LONG):
        whole = step_through(model, IDS, [40])
        pieces = step_through(model, IDS, [17, 13, 1, 1, 8])
        with torch.no_grad():
            start = model(IDS[:, :30], use_cache=False).logits
        if CASES[name].sheds == "parameters":
            assert parameters(model) < many
        if CASES[name].sheds is not None:
            assert weight_bytes(model) < size
    assert not torch.allclose(whole, full, atol=1e-2)
    torch.testing.assert_close(pieces, whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(start, whole[:, :30], atol=1e-3, rtol=1e-3)
    assert trace() == before
    assert torch.equal(step_through(model, IDS, [40]), full)
    with pytest.raises(RuntimeError, match="inside"), apply(model, recipe(name, CASES[name].small), calibration=LONG):
        raise RuntimeError("a failure inside the block")
    assert trace() == before


@pytest.mark.parametrize("name, family", PAIRS)
def test_generate_works_as_it_is(name, family):
    model = tiny(family)

    def generate(ids, mask):
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, do_sample=False
        )

    ones, pad = torch.ones_like(IDS), torch.zeros(1, 5, dtype=torch.long)
    other = torch.randint(3, 120, (1, 45), generator=torch.Generator().manual_seed(2))
    with apply(model, recipe(name, CASES[name].small), calibration=LONG):
        alone = generate(IDS, ones)
        both = generate(
            torch.cat([other, torch.cat([pad, IDS], 1)]),
            torch.cat([torch.ones_like(other), torch.cat([pad, ones], 1)]),
        )
        assert torch.equal(both[1, 5:], alone[0]), "batched with padding differs from alone"
        assert torch.equal(both[0], generate(other, torch.ones_like(other))[0])


@pytest.mark.parametrize("name, family", PAIRS)
def test_made_permanent_and_saved_it_opens_as_what_it_was(name, family, tmp_path):
    model = tiny(family)
    with apply(model, recipe(name, CASES[name].small), calibration=LONG):
        logits = step_through(model, IDS, [40])
    small = fv.thin(model, recipe(name, CASES[name].small), calibration=LONG)
    save(small, fv.tiny_tokenizer(), tmp_path / "small", card="A test.")
    opened, _ = fv.load(tmp_path / "small", dtype="float32", device="cpu")
    torch.testing.assert_close(step_through(opened, IDS, [40]), logits, atol=1e-5, rtol=1e-5)
    assert weight_bytes(opened) == weight_bytes(small)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name):
    model = tiny(CASES[name].families[0]).to(torch.bfloat16)
    with apply(model, recipe(name, CASES[name].small), calibration=LONG):
        logits = step_through(model, IDS, [30] + [1] * 10)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


@pytest.mark.parametrize("name", CASES)
def test_a_cache_policy_works_on_it_or_says_why_not(name):
    model = tiny("llama")
    with apply(model, recipe(name, CASES[name].small), calibration=LONG):
        before = step_through(model, IDS, [40])
        try:
            with apply(model, "h2o:entries=16"):
                out = model(IDS, use_cache=True)
                model(IDS[:, :1], past_key_values=out.past_key_values)
                assert max(int(layer.held().max()) for layer in out.past_key_values.layers) == 16
        except FoveateError as error:
            assert "not converted so" in str(error)
        torch.testing.assert_close(step_through(model, IDS, [40]), before)
