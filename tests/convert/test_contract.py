"""The contract of every converter, on a tiny model of every family that it knows."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM

from foveate.convert import Converter
from foveate.measure.weights import weight_bytes
from foveate.methods import METHODS, apply
from foveate.models.tiny import TINY_FAMILIES, tiny
from foveate.portable import portable_classes
from foveate.portable.parts import build


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
def test_a_stock_skeleton_becomes_the_converted_model(name, family):
    """What a saved folder does where foveate is not installed: the skeleton, the portable files, the weights."""
    model = tiny(family)
    with apply(model, recipe(name, CASES[name].small), calibration=LONG):
        logits = step_through(model, IDS, [40])
        state = {key: value.clone() for key, value in model.state_dict().items()}
        classes = portable_classes()
        modules = {
            path: [type(module).__name__, module.settings]
            for path, module in model.named_modules()
            if type(module).__name__ in classes
        }
    skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    build(skeleton, {"modules": modules, "heads": {}}, classes)
    skeleton.load_state_dict(state)
    skeleton.eval()
    torch.testing.assert_close(step_through(skeleton, IDS, [40]), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name):
    model = tiny(CASES[name].families[0]).to(torch.bfloat16)
    with apply(model, recipe(name, CASES[name].small), calibration=LONG):
        logits = step_through(model, IDS, [30] + [1] * 10)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
