"""The contract of every steering technique, on a tiny model of every supported family."""

from __future__ import annotations

import copy

import pytest
import torch

from foveate.cache import PolicyCache
from foveate.errors import FoveateError
from foveate.methods import METHODS, apply
from foveate.models.tiny import TINY_FAMILIES, tiny
from foveate.steer import Steer
from foveate.steer.reweave import reweave_module

NAMES = sorted(
    name for name, cls in METHODS.all().items() if issubclass(cls, Steer) and cls.__module__.startswith("foveate.")
)
NEUTRAL = {
    "calibrate-attention": "beta=1",
    "reweave": "weights={neutral}",
    "temp-scale": "temperature=1",
    "weaken-last": "strength=0",
}
STRONG = {
    "calibrate-attention": "alpha=1.5,choose=all",
    "reweave": "weights={strong}",
    "temp-scale": "temperature=0.3",
    "weaken-last": "strength=1",
}
PROMPT = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Modules for `reweave`: an untrained one, and one whose gate is open. All tiny models have the same width."""
    folder = tmp_path_factory.mktemp("modules")
    module = reweave_module(tiny("llama"), layers=[0, 2], at=2)
    module.save(folder / "neutral.safetensors")
    torch.nn.init.normal_(module.gate)
    module.save(folder / "strong.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("neutral", "strong")}


def recipe(name, settings, files):
    return f"{name}:{settings[name].format(**files)}"


def test_the_contract_knows_every_technique():
    assert NAMES == sorted(NEUTRAL) == sorted(STRONG)


@torch.no_grad()
def step_through(model, ids, pieces):
    """Logits of `ids` read in pieces of the given sizes, and the cache."""
    cache, logits, start = None, [], 0
    for size in pieces:
        out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + size
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("name", NAMES)
def test_the_neutral_setting_is_the_model_itself(model, name, files):
    full, _ = step_through(model, PROMPT, [40])
    with apply(model, recipe(name, NEUTRAL, files)):
        for pieces in ([40], [17, 13, 1, 1, 8]):
            torch.testing.assert_close(step_through(model, PROMPT, pieces)[0], full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_give_the_same_as_the_whole_and_nothing_looks_ahead(model, name, files):
    full, _ = step_through(model, PROMPT, [40])
    with apply(model, recipe(name, STRONG, files)):
        whole, _ = step_through(model, PROMPT, [40])
        pieces, _ = step_through(model, PROMPT, [17, 13, 1, 1, 8])
        with torch.no_grad():
            uncached = model(PROMPT, use_cache=False).logits
            start = model(PROMPT[:, :30], use_cache=False).logits
    assert not torch.allclose(whole, full, atol=1e-2)
    for other in (pieces, uncached):
        torch.testing.assert_close(other, whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(start, whole[:, :30], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "how", [{}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 3}], ids=["greedy", "sample", "beam"]
)
def test_generate_works_as_it_is(model, name, how, files):
    def generate(ids, mask):
        torch.manual_seed(0)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **({"do_sample": False} | how)
        )

    ones = torch.ones_like(PROMPT)
    full = generate(PROMPT, ones)
    with apply(model, recipe(name, NEUTRAL, files)):
        assert torch.equal(generate(PROMPT, ones), full)
    with apply(model, recipe(name, STRONG, files)):
        alone = generate(PROMPT, ones)
        assert alone.shape == full.shape
        if "do_sample" not in how:
            padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), PROMPT], 1)
            mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), ones], 1)
            other = torch.randint(3, 120, (1, 45), generator=torch.Generator().manual_seed(2))
            both = generate(torch.cat([other, padded]), torch.cat([torch.ones_like(other), mask]))
            assert torch.equal(both[1, 5:], alone[0]), "batched with padding differs from alone"
            assert torch.equal(both[0], generate(other, torch.ones_like(other))[0])


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(model, name, files):
    half = copy.deepcopy(model).to(torch.bfloat16)
    full, _ = step_through(half, PROMPT, [30] + [1] * 10)
    with apply(half, recipe(name, NEUTRAL, files)):
        ours, _ = step_through(half, PROMPT, [30] + [1] * 10)
    assert (ours - full).float().norm() < 0.03 * full.float().norm()
    with apply(half, recipe(name, STRONG, files)):
        ours, _ = step_through(half, PROMPT, [30] + [1] * 10)
    assert ours.dtype == torch.bfloat16 and torch.isfinite(ours).all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind(model, name, files):
    def trace(m):
        hooks = [
            (n, len(x._forward_hooks), len(x._forward_pre_hooks), "forward" in vars(x)) for n, x in m.named_modules()
        ]
        return hooks, m.config.to_dict(), m.config._attn_implementation, sorted(m.state_dict())

    before, logits = trace(model), model(PROMPT).logits
    with apply(model, recipe(name, STRONG, files)):
        model(PROMPT, use_cache=True)
    assert trace(model) == before
    assert torch.equal(model(PROMPT).logits, logits)
    with pytest.raises(RuntimeError, match="inside"), apply(model, recipe(name, STRONG, files)):
        raise RuntimeError("a failure inside the block")
    with pytest.raises(Exception), apply(model, recipe(name, STRONG, files)):  # noqa: B017
        model(PROMPT, attention_mask=torch.ones(1, 1, 3, 40))  # fails inside attention, if it does
        raise RuntimeError
    assert trace(model) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_with_a_cache_policy_in_one_recipe(model, name, first, files):
    """A policy that evicts nothing gives what the technique alone gives; one that evicts keeps its budget."""
    ours = recipe(name, STRONG, files)

    def both(policy):
        return f"{ours}+{policy}" if first else f"{policy}+{ours}"

    with apply(model, ours):
        alone, _ = step_through(model, PROMPT, [30, 1, 9])
    for policy in ("window:keep=1", "h2o:keep=1"):
        with apply(model, both(policy)):
            combined, cache = step_through(model, PROMPT, [30, 1, 9])
        assert isinstance(cache, PolicyCache)
        torch.testing.assert_close(combined, alone, atol=1e-3, rtol=1e-3)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), PROMPT], 1)
    mask = (padded != 0).long()
    with apply(model, both("h2o:entries=9")):
        _, cache = step_through(model, PROMPT, [30, 1, 9])
        assert all(int(layer.held().max()) <= 9 for layer in cache.layers)
        one = model.generate(PROMPT, max_new_tokens=5, do_sample=False, pad_token_id=0, num_beams=2)
        batch = torch.cat([padded, padded])
        two = model.generate(
            batch,
            attention_mask=torch.cat([mask, mask]),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            num_beams=2,
        )
    assert torch.equal(two[0, 5:], one[0]) and torch.equal(two[1], two[0])


@pytest.mark.parametrize("name", NAMES)
def test_with_skipped_layers_and_without_attention(name, files):
    model, ours = tiny("llama"), recipe(name, STRONG, files)
    for other in ("skip-layers:keep=0.75", "drop-attention:keep=0.75"):
        for both in (f"{ours}+{other}", f"{other}+{ours}"):
            with apply(model, both, calibration=PROMPT):
                whole, _ = step_through(model, PROMPT, [40])
                pieces, _ = step_through(model, PROMPT, [17, 1, 22])
            torch.testing.assert_close(pieces, whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_filled_cache_gets_a_sentence(name, files):
    model = tiny("llama")
    cache = model(PROMPT, use_cache=True).past_key_values
    with pytest.raises(FoveateError, match="before the recipe"), apply(model, recipe(name, STRONG, files)):
        model(PROMPT, past_key_values=cache)
