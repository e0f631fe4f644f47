"""Attention calibration against a slow reference in float64; rows sum to one; what is planted is found."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.methods import Target, apply
from foveate.steer import AttentionView
from foveate.steer import attention as steer_attention
from foveate.steer.calibrate_attention import CalibrateAttention

IDS = torch.randint(3, 120, (2, 30), generator=torch.Generator().manual_seed(1))


def reference(weights, alpha, beta):
    """Row by row: the paper's calibration, as if the text ended there. Weights: float64 (query, entry), causal."""
    out = weights.clone()
    for t in range(len(weights)):
        received = [weights[s : t + 1, s].mean() for s in range(t + 1)]
        sinks = [s for s in range(1, t + 1) if received[s] > alpha / (t + 1)]
        rest = [s for s in range(t + 1) if s not in sinks]
        freed = sum((1 - beta) * weights[t, s] for s in sinks)
        held = sum(weights[t, s] for s in rest)
        for s in sinks:
            out[t, s] = beta * weights[t, s]
        for s in rest:
            out[t, s] = weights[t, s] + freed * weights[t, s] / held
    return out


def view_of(weights):
    """A view of causal weights (query, entry)."""
    n = len(weights)
    asked = (torch.arange(n)[:, None] - torch.arange(n) + 1).clamp(min=1)
    return AttentionView(
        0,
        torch.tensor([0]),
        weights[None, None],
        (weights.cumsum(0) / asked)[None, None],
        torch.arange(1, n + 1)[None, None, :, None],
        (torch.arange(n) == 0)[None, None, None],
    )


@pytest.mark.parametrize("alpha,beta", [(1.2, 0.4), (2.0, 0.0), (5.0, 0.4)])
def test_weights_are_those_of_the_reference_and_rows_sum_to_one(alpha, beta):
    logits = 2 * torch.randn(40, 40, dtype=torch.float64)
    logits[:, 7] += 4
    weights = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)
    ours = CalibrateAttention(alpha=alpha, beta=beta).adjust(view_of(weights))[0, 0]
    torch.testing.assert_close(ours, reference(weights, alpha, beta))
    torch.testing.assert_close(ours.sum(-1), torch.ones(40, dtype=torch.float64))
    assert float(ours[-1, 7]) < float(weights[-1, 7])


def test_a_row_all_of_whose_attention_is_on_sinks_stays():
    weights = torch.zeros(10, 10)
    weights[0, 0], weights[1:, 1] = 1, 1
    ours = CalibrateAttention(alpha=1.5).adjust(view_of(weights))[0, 0]
    assert torch.equal(ours, weights)


def test_the_model_attends_by_the_references_weights(monkeypatch):
    """The output of the one layer that is calibrated, of a model with a block of queries as small as can be."""
    monkeypatch.setattr(steer_attention, "BLOCK", 1)
    model = fv.tiny("llama").double()
    model.set_attn_implementation("eager")
    layer, seen = model.model.layers[2], {}
    hook = layer.self_attn.register_forward_hook(lambda m, a, out: seen.update(out=out[0]))
    values = layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: seen.update(v=out))
    weights = model(IDS, output_attentions=True).attentions[2]
    with apply(model, "calibrate-attention:alpha=1.5,choose=all"):
        model(IDS)
    v = seen["v"].view(2, 30, 2, 16).transpose(1, 2).repeat_interleave(2, 1)
    new = torch.stack([torch.stack([reference(head, 1.5, 0.4) for head in text]) for text in weights])
    out = layer.self_attn.o_proj((new @ v).transpose(1, 2).flatten(2))
    hook.remove(), values.remove()
    torch.testing.assert_close(seen["out"], out, atol=1e-6, rtol=1e-5)


def test_only_layers_from_the_third_to_the_last_but_one_may_be_chosen():
    parts = fv.anatomy(fv.tiny("llama", num_hidden_layers=6))
    assert CalibrateAttention().candidates(parts)[:, 0].tolist() == [False, False, True, True, True, False]


def test_the_slope_is_that_of_the_loss():
    """Against a finite difference: 1e-3 of the way from one to the other."""
    model = fv.tiny("llama").double()
    parts, ids, technique = fv.anatomy(model), IDS[:1], CalibrateAttention(alpha=1.5)
    candidates = technique.candidates(parts)
    slopes = technique._slopes(parts, ids, candidates)
    small = dataclasses.replace(technique, beta=1 - 1e-3 * 0.6)  # calibration is linear in beta
    with torch.no_grad():
        changes = small._changes(parts, ids, candidates) / 1e-3
    torch.testing.assert_close(slopes[2].float(), changes[2], atol=1e-3, rtol=0.02)
    assert (slopes[[0, 1, 3]] == 0).all() and all(p.grad is None for p in model.parameters())


def test_heads_are_those_that_help_on_every_piece():
    model = fv.tiny("llama", num_hidden_layers=5)
    parts, target = fv.anatomy(model), Target(model, None, lambda: IDS[:1].repeat(1, 8), fv.tiny_tokenizer)
    for choose in ("slope", "each"):
        technique = CalibrateAttention(alpha=1.5, choose=choose)
        scores, chosen = technique.score(target, parts), technique.heads(target, parts)
        assert scores.kind == "head" and scores.scores.isnan()[[0, 1, 4]].all()
        assert torch.equal(chosen, scores.scores > 0)


@pytest.mark.parametrize(
    "fields,says", [("alpha=0", "positive"), ("beta=1.5", "outside"), ("choose=best", "slope, each, all")]
)
def test_bad_fields_get_a_sentence(fields, says):
    with pytest.raises(FoveateError, match=says), apply(fv.tiny("llama"), f"calibrate-attention:{fields}"):
        pass


def test_twice_gets_a_sentence_and_so_does_a_policy_that_renumbers():
    model, twice = fv.tiny("llama"), "calibrate-attention:choose=all+calibrate-attention:choose=all"
    with pytest.raises(FoveateError, match="adjusted already"), apply(model, twice):
        pass
    with (
        pytest.raises(FoveateError, match="positions=text"),
        apply(model, "calibrate-attention:choose=all+streaming:entries=8"),
    ):
        model(IDS, use_cache=True)
    assert model.config._attn_implementation == "sdpa"
    with apply(model, "calibrate-attention:choose=all+streaming:entries=8,positions=text"):
        model(IDS, use_cache=True)


def test_a_cache_can_not_be_cropped():
    with apply(model := fv.tiny("llama"), "calibrate-attention:choose=all"):
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(FoveateError, match="assistant"):
            cache.crop(-2)


def test_a_decode_loop_is_refused():
    model = fv.tiny("llama")
    with apply(model, "calibrate-attention:choose=all+h2o:entries=16"), torch.no_grad():
        out = model(IDS, use_cache=True)
        loop = fv.DecodeLoop(model, out.past_key_values)
        with pytest.raises(FoveateError, match="generate"):
            loop.generate(IDS[:, :1], 3)
