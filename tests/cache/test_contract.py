"""The contract of every cache policy, on a tiny model of every supported family."""

from __future__ import annotations

import copy

import pytest
import torch

import foveate as fv
from foveate.cache import CachePolicy, PolicyCache
from foveate.methods import METHODS, apply
from foveate.models.tiny import TINY_FAMILIES, tiny

POLICIES = sorted(
    name
    for name, cls in METHODS.all().items()
    if issubclass(cls, CachePolicy) and cls.__module__.startswith("foveate.")
)
LOSSLESS = {name: name if METHODS.all()[name].code is None else f"{name}:code=none" for name in POLICIES}
EVICTING = [LOSSLESS[name] for name in POLICIES if METHODS.all()[name].evicts]
POLICIES = list(LOSSLESS.values())


def under(policy, budget):
    """The recipe of a policy with a budget."""
    return f"{policy}{',' if ':' in policy else ':'}{budget}"


PROMPT = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def model(request):
    return tiny(request.param)


@torch.no_grad()
def step_through(model, ids, pieces):
    """Logits of `ids` read in pieces of the given sizes, and the cache."""
    cache, logits, start = None, [], 0
    for size in pieces:
        out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + size
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("policy", POLICIES)
def test_keep_1_is_the_full_cache(model, policy):
    full, _ = step_through(model, PROMPT, [40])
    for pieces in ([40], [17, 13, 1, 1, 8], [30] + [1] * 10):
        with apply(model, under(policy, "keep=1")):
            ours, cache = step_through(model, PROMPT, pieces)
        assert isinstance(cache, PolicyCache)
        torch.testing.assert_close(ours, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("budget,most", [("keep=0.25", 10), ("entries=7", 7)])
def test_budget_is_never_exceeded(model, policy, budget, most):
    with apply(model, under(policy, f"{budget},budget=uniform")) as recipe:  # others spread the same total
        cache = None
        for size in (40, 1, 1, 1):
            ids = PROMPT[:, :size]
            with torch.no_grad():
                cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
            for layer in cache.layers:
                assert layer.positions.shape[-1] <= most
                assert layer.keys.shape[-2] == layer.values.shape[-2] == layer.positions.shape[-1]
                assert int(layer.held().max()) <= most
    method = recipe.methods[0]
    seen = cache.get_seq_length()
    assert seen == 43
    for layer, parts in zip(cache.layers, fv.anatomy(model).layers, strict=True):
        for held in layer.positions[0].tolist():
            live = [p for p in held if p >= 0]
            assert live == sorted(set(live))
            assert live[-1] == seen - 1
            if parts.sliding_window is None:
                assert live[: method.sinks] == list(range(method.sinks))
                recent = max(1, min(int(most * method.recent), most - method.sinks))
                assert live[-recent:] == list(range(seen - recent, seen))


@pytest.mark.parametrize("policy", sorted({*POLICIES} - {*EVICTING}))
@pytest.mark.parametrize("budget,most", [("keep=0.25", 10), ("entries=7", 7)])
def test_where_nothing_is_evicted_no_more_than_the_budget_is_read(model, policy, budget, most):
    with apply(model, f"{policy}:{budget}"):
        cache, before = None, torch.zeros(1, 1)
        for size in (40, 1, 1, 1):
            with torch.no_grad():
                cache = model(PROMPT[:, :size], past_key_values=cache, use_cache=True).past_key_values
            seen, layer = cache.get_seq_length(), cache.layers[-1]
            read, before = layer.read - before, layer.read
            assert (layer.held() == seen).all()
            assert (read == (seen if size > 1 else most)).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "how", [{}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 3}], ids=["greedy", "sample", "beam"]
)
def test_generate_works_as_it_is(model, policy, how):
    def generate(ids, mask):
        torch.manual_seed(0)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **({"do_sample": False} | how)
        )

    ones = torch.ones_like(PROMPT)
    full = generate(PROMPT, ones)
    with apply(model, under(policy, "keep=1")):
        assert torch.equal(generate(PROMPT, ones), full)
    with apply(model, under(policy, "keep=0.3")):
        alone = generate(PROMPT, ones)
        assert alone.shape == full.shape
        if "do_sample" not in how:
            padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), PROMPT], 1)
            mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), ones], 1)
            other = torch.randint(3, 120, (1, 45), generator=torch.Generator().manual_seed(2))
            both = generate(torch.cat([other, padded]), torch.cat([torch.ones_like(other), mask]))
            assert torch.equal(both[1, 5:], alone[0]), "batched with padding differs from alone"
            assert torch.equal(both[0], generate(other, torch.ones_like(other))[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_bfloat16(model, policy):
    half = copy.deepcopy(model).to(torch.bfloat16)
    full, _ = step_through(half, PROMPT, [30] + [1] * 10)
    with apply(half, under(policy, "keep=1")):
        ours, cache = step_through(half, PROMPT, [30] + [1] * 10)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert (ours - full).float().norm() < 0.03 * full.float().norm()  # two orders of rounding of 8 bits each
    with apply(half, under(policy, "keep=0.3")):
        assert torch.isfinite(step_through(half, PROMPT, [30] + [1] * 10)[0]).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_left_behind(model, policy):
    def trace(m):
        hooks = [
            (n, len(x._forward_hooks), len(x._forward_pre_hooks), "forward" in vars(x)) for n, x in m.named_modules()
        ]
        return hooks, m.config.to_dict(), m.config._attn_implementation, sorted(m.state_dict())

    before, logits = trace(model), model(PROMPT).logits
    with apply(model, under(policy, "keep=0.3")):
        model(PROMPT, use_cache=True)
    assert trace(model) == before
    assert torch.equal(model(PROMPT).logits, logits)
    with pytest.raises(RuntimeError, match="inside"), apply(model, under(policy, "keep=0.3")):
        raise RuntimeError("a failure inside the block")
    assert trace(model) == before


@pytest.mark.parametrize("policy", POLICIES)
def test_without_a_cache_nothing_is_evicted(model, policy):
    mask = torch.ones_like(PROMPT)
    mask[:, :4] = 0
    full = model(PROMPT, attention_mask=mask, use_cache=False).logits[:, 4:]
    with apply(model, under(policy, "keep=0.1")):
        out = model(PROMPT, attention_mask=mask, use_cache=False)
    assert out.past_key_values is None
    torch.testing.assert_close(out.logits[:, 4:], full, atol=1e-4, rtol=1e-4)
