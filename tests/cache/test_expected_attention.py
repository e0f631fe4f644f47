"""Expected attention against a slow reference in float64: the formula, its statistics, and the averaged rotation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.models.anatomy import anatomy
from foveate.models.tiny import tiny

IDS = torch.randint(3, 200, (1, 60), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def read(model, recipe, pieces):
    cache, start = None, 0
    with apply(model, recipe):
        for size in pieces:
            out = model(IDS[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
    return cache


def reference(model, layer, tokens, sinks, future, epsilon):
    """Scores of all entries but sinks, (kv_head, entry), one by one; the rotation by complex numbers."""
    parts, caught = anatomy(model), []
    projection = parts.layers[layer].q
    handle = projection.register_forward_hook(lambda module, inputs, out: caught.append(out))
    with torch.no_grad():
        cache = model(IDS[:, :tokens], use_cache=True).past_key_values.layers[layer]
    handle.remove()
    query = caught[0][0].view(tokens, parts.heads, parts.head_dim)
    inv_freq, half, d = parts.inv_freq(layer).double(), parts.head_dim // 2, parts.head_dim
    spun = sum(torch.polar(torch.ones(half).double(), (tokens + t) * inv_freq) for t in range(future)) / future
    real, imaginary = torch.diag(spun.real), torch.diag(spun.imag)
    turn = torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)], 0)
    group = parts.heads // parts.kv_heads
    scores = torch.zeros(parts.kv_heads, tokens, dtype=torch.float64)
    for h in range(parts.heads):
        q = query[sinks:, h]
        mean, covariance = turn @ q.mean(0), turn @ torch.cov(q.T, correction=0) @ turn.T
        keys = cache.keys[0, h // group]
        weight = [math.exp(k @ mean / math.sqrt(d) + k @ covariance @ k / (2 * d)) for k in keys[sinks:]]
        scores[h // group, sinks:] += torch.tensor(weight).double() / sum(weight) / group
    return (scores + epsilon) * cache.values[0].norm(dim=-1)


@pytest.mark.parametrize("epsilon", [0, 0.01])
@pytest.mark.parametrize("scale", [0.2, 1])  # at 1 the shares of most entries are far too small for float32
def test_the_same_entries_as_the_reference(epsilon, scale):
    model = tiny("llama").double()
    anatomy(model).layers[0].q.weight.data *= scale
    cache = read(model, f"expected-attention:entries=12,sinks=3,future=20,epsilon={epsilon}", [40])
    scores = reference(model, 0, 40, 3, 20, epsilon)
    scores[:, :3] = scores[:, -1] = torch.inf  # sinks and the last always stay
    assert cache.layers[0].positions[0].tolist() == scores.topk(12).indices.sort().values.tolist()


@settings(max_examples=8, deadline=None)
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_statistics_are_those_of_the_queries_before_rotation_however_they_came(pieces):
    model, tokens, caught = tiny("llama").double(), sum(pieces), []
    handle = anatomy(model).layers[0].q.register_forward_hook(lambda module, inputs, out: caught.append(out))
    cache = read(model, "expected-attention:entries=64,sinks=2", pieces)
    handle.remove()
    query = torch.cat(caught, 1)[0, 2:].unflatten(-1, (4, 16)).transpose(0, 1)
    state = cache.layers[0].state
    assert float(state["count"].flatten()[0]) == max(tokens - 2, 0)
    if tokens > 2:
        torch.testing.assert_close(state["mean"][0], query.mean(1), atol=1e-5, rtol=1e-5)
        off = query - query.mean(1, keepdim=True)
        torch.testing.assert_close(state["squares"][0], off.transpose(1, 2) @ off, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("before", [0, 20])
def test_padding_is_not_counted(before):
    """Five padding tokens, at the start or at the start of a second forward."""
    model, pieces = tiny("llama"), [before, 30 - before] if before else [30]
    alone = read(model, "expected-attention:entries=10", pieces).layers[0]
    padded = torch.cat([IDS[:, :before], torch.zeros(1, 5, dtype=torch.long), IDS[:, before:30]], 1)
    mask = torch.ones_like(padded)
    mask[:, before : before + 5] = 0
    cache, start = None, 0
    with apply(model, "expected-attention:entries=10"), torch.no_grad():
        for size in [*pieces[:-1], pieces[-1] + 5]:
            part = slice(start, start + size)
            place = (mask.cumsum(-1) - 1).clamp(min=0)[:, part]
            out = model(
                padded[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=place,
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = out.past_key_values, part.stop
    ours = cache.layers[0]
    assert torch.equal(ours.positions, alone.positions)
    for name in ("count", "mean", "squares"):
        torch.testing.assert_close(ours.state[name], alone.state[name], atol=1e-4, rtol=1e-4)


def test_without_rotation_the_queries_are_taken_as_they_are():
    model, caught = tiny("opt"), []
    handle = anatomy(model).layers[0].q.register_forward_hook(lambda module, inputs, out: caught.append(out))
    cache = read(model, "expected-attention:entries=10,sinks=0", [30])
    handle.remove()
    mean = caught[0][0].view(30, 4, -1).mean(0)
    ratio = cache.layers[0].state["mean"][0] / mean  # OPT scales its queries
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), atol=1e-3, rtol=1e-3)


def test_frequencies_that_change_get_a_sentence():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny("llama", rope_parameters=rope)
    with pytest.raises(FoveateError, match="change with the length"), apply(model, "expected-attention:keep=0.5"):
        pass


@pytest.mark.parametrize("field", ["future=0", "epsilon=-1"])
def test_bad_fields_get_a_sentence(field):
    with pytest.raises(FoveateError, match=field.split("=")[0]):
        Recipe.of(f"expected-attention:keep=0.2,{field}")
