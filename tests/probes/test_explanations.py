"""Explanations: each way is what it says, agreement is Kendall's, and planted evidence is found."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.planted import Planted
from foveate.models.tiny import TINY_FAMILIES
from foveate.probes import Data
from foveate.probes import explanations as room
from foveate.probes.explanations import (
    STEPS,
    WAYS,
    Explanations,
    ExplanationsDisagree,
    kendall,
    mean_embedding,
    planted_evidence,
    recall,
    weights_of_tokens,
)

IDS = torch.randint(3, 250, (16,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return fv.tiny("llama", num_hidden_layers=2, initializer_range=0.1)


@pytest.fixture(scope="module")
def weights(model):
    return dict(zip(WAYS, weights_of_tokens(model, IDS), strict=True))


@pytest.fixture(scope="module")
def goal(model):
    """The log-probability of the model's own guess, of embeddings (batch, token, hidden)."""
    with torch.no_grad():
        guess = int(model(IDS[None]).logits[0, -1].argmax())
    return lambda words: model(inputs_embeds=words).logits[:, -1].log_softmax(-1)[:, guess]


def test_kendall_is_scipys():
    draw = torch.Generator().manual_seed(0)
    for ties in (10**6, 4):
        for _ in range(10):
            a, b = torch.randint(ties, (2, 15), generator=draw).double()
            assert kendall(a, b) == pytest.approx(kendalltau(a.numpy(), b.numpy()).statistic)
    assert kendall(a, a) == 1 and kendall(a, -a) == -1 and kendall(a, torch.zeros(15)) == 0


def test_attention_and_rollout_are_those_of_eager_attention(model, weights):
    eager = fv.tiny("llama", num_hidden_layers=2, initializer_range=0.1)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        first, second = (maps[0].mean(0) for maps in eager(IDS[None], output_attentions=True).attentions)
    torch.testing.assert_close(weights["attention"].float(), second[-1])
    one = torch.eye(16)
    torch.testing.assert_close(weights["rollout"].float(), ((second / 2 + one / 2) @ (first / 2 + one / 2))[-1])


def test_gradients_are_those_of_autograd(model, weights, goal):
    table = model.get_input_embeddings().weight.detach()
    words, nothing = table[IDS][None], table.mean(0)
    given = words.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(goal(given).sum(), given)
    expected = (gradient * words)[0].sum(-1).abs()
    torch.testing.assert_close(weights["gradient x input"].float(), expected, atol=1e-4, rtol=1e-4)
    total = torch.zeros_like(words)
    for x, part in zip(*np.polynomial.legendre.leggauss(STEPS), strict=True):
        given = (nothing + (x + 1) / 2 * (words - nothing)).float().requires_grad_()
        total += part / 2 * torch.autograd.grad(goal(given).sum(), given)[0]
    expected = (total * (words - nothing))[0].sum(-1).abs()
    torch.testing.assert_close(weights["integrated gradients"].float(), expected, atol=1e-4, rtol=1e-3)


def test_leave_one_out_takes_one_token_away_at_a_time(model, weights, goal):
    table = model.get_input_embeddings().weight.detach()
    for at in range(16):
        words = table[IDS][None].clone()
        with torch.no_grad():
            whole = goal(words)
            words[0, at] = table.mean(0)
            lost = (whole - goal(words)).abs()
        torch.testing.assert_close(weights["leave one out"][at].float(), lost[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_what_stands_for_nothing_is_the_mean_embedding(family):
    table = fv.tiny(family).get_input_embeddings()
    with torch.no_grad():
        torch.testing.assert_close(mean_embedding(table), table(torch.arange(260)).mean(0))


def test_lime_finds_the_slopes_of_a_sum():
    slopes = torch.tensor([3.0, -1.0, 0.0, 0.5, 2.0])
    words, nothing = torch.ones(1, 5, 3), torch.zeros(1, 5, 3)
    found = room._lime(lambda w: 100 * w[..., 0] @ slopes, words, nothing, torch.Generator().manual_seed(0))
    # The penalty of 1 hardly matters against slopes of hundreds and 64 texts.
    torch.testing.assert_close(found.float(), 100 * slopes, rtol=0.2, atol=20.0)
    assert found.abs().argsort().tolist() == [2, 3, 1, 4, 0]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "gpt_neox", "phi3"])
def test_it_works_in_other_families_and_in_bfloat16(family):
    model = fv.tiny(family, num_hidden_layers=1).to(torch.bfloat16)
    with torch.no_grad():
        found = weights_of_tokens(model, IDS)
    assert found.shape == (len(WAYS), 16) and found.isfinite().all() and (found >= 0).all()
    assert (found.amax(-1) > 0).all()


def induction():
    """Induction, and no head that looks at its own token."""
    return Planted(layers=2).previous(0, 1).head(1, 3, match=("token", "previous"), move=("token", "out")).model()


def data_of(model, **given):
    return Data.of(model, fv.tiny_tokenizer(), length=16, passages=2, **given)


def test_evidence_is_planted_where_it_says():
    model = induction()
    prompts, answers, sources = planted_evidence(model, data_of(model), 8, 18, seed=3)
    for row, answer, source in zip(prompts, answers, sources, strict=True):
        period = 18 - source
        assert 9 < period <= 12 and torch.equal(row[period:], row[:source])
        assert row[source] == answer and len(row[:period].unique()) == period
    assert len(set(sources)) > 1


def test_planted_evidence_is_found():
    model = induction()
    found = recall(model, *planted_evidence(model, data_of(model), 2, 18, seed=0))
    named = {WAYS[way]: hits.value for way, hits in found.items()}
    assert named["attention"] == 1  # the last layer's only head that looks anywhere looks there
    assert all(named[way] == 1 for way in ("leave one out", "LIME", "integrated gradients")), named


def test_where_the_model_guesses_wrongly_nothing_is_said():
    model = fv.tiny("llama", num_hidden_layers=1)
    assert recall(model, *planted_evidence(model, data_of(model), 2, 18, seed=0)) == {}


def test_low_agreement_with_evidence_found():
    """The point of the probe: two ways may both be right about what matters, and rank the rest each by itself."""
    model = induction()
    prompts, _, sources = planted_evidence(model, data_of(model), 1, 18, seed=0)
    weights = dict(zip(WAYS, weights_of_tokens(model, prompts[0]), strict=True))
    one, other = weights["attention"], weights["leave one out"]
    assert one.argmax() == sources[0] and sources[0] in other.topk(3).indices
    assert kendall(one, other) < 0.9


def test_the_reading_has_all_pairs_and_marks_a_passage(model):
    done = []
    data = data_of(model, progress=done.append)
    reading = Explanations(tokens=16).measure(model, data)
    grid, rows, *marked = reading.panels
    assert len(grid.values) == 7 and all(grid.values[i][i] == 1 for i in range(7))
    assert all(grid.values[i][j] == grid.values[j][i] for i in range(7) for j in range(7))
    assert len(rows.rows) == 21 and [panel.title for panel in marked] == [f"By {way}" for way in WAYS]
    assert all(max(panel.weights) == 1 and len(panel.tokens) == 16 for panel in marked)
    assert done[-1] == 1 and done == sorted(done)
    ids = data_of(model).stream("mine", model)
    taus = [kendall(*weights_of_tokens(model, row)[[0, 3]]) for row in ids]
    assert grid.values[0][3] == pytest.approx(sum(taus) / 2)


def test_global_generators_are_left_alone(model):
    torch.manual_seed(3), np.random.seed(3)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(3), np.random.seed(3)
    first = weights_of_tokens(model, IDS)
    assert torch.equal(torch.rand(2), expected[0]) and (np.random.rand(2) == expected[1]).all()
    assert torch.equal(weights_of_tokens(model, IDS), first)
    assert not torch.equal(weights_of_tokens(model, IDS, seed=1)[WAYS.index("LIME")], first[WAYS.index("LIME")])


def test_without_captum_there_is_a_sentence(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(FoveateError, match=r"pip install 'foveate\[explain\]'"):
        Explanations().check(model, data_of(model))


@pytest.mark.parametrize("tokens", [8, 300])
def test_too_few_or_many_tokens_is_a_sentence(tokens, model):
    with pytest.raises(FoveateError, match="give 16 to 256"):
        Explanations(tokens=tokens).check(model, data_of(model))


def test_the_claim_runs(monkeypatch):
    for name, size in (("cases", 1), ("prompts", 2), ("tokens", 16)):
        monkeypatch.setattr(ExplanationsDisagree, name, size)
    monkeypatch.setattr(room, "MASKED", 24)
    model = induction()
    finding = ExplanationsDisagree().run(fv.Bench(model, fv.tiny_tokenizer(), fv.load_text()))
    assert len(finding.checks) == 3 and sum(name.startswith("tau") for name in finding.metrics) == 21
    assert finding.metrics["planted evidence found by leave one out"].value == 1
