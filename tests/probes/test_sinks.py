"""Sinks: what was planted is found, what was not is not, and the numbers are those of eager attention."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.models.planted import Planted
from foveate.probes import Data
from foveate.probes.sinks import Sinks, SinksArise
from foveate.tasks.base import Bench


def read(model, length=64, passages=2, **fields):
    return Sinks(**fields).measure(model, Data.of(model, fv.tiny_tokenizer(), length=length, passages=passages))


def test_exactly_the_planted_sink_is_found():
    reading = read(fv.planted(), length=128)
    assert [(r.role, r.layer, r.unit) for r in reading.roles] == [("sink", 1, 0)]
    assert float(reading.scores["sink"].scores[1, 0]) > 0.99
    assert reading.metrics["heads that rest on the first token"].value == 1


def test_a_sink_at_a_later_token_is_one_there_and_no_first():
    reading = read(Planted().sink(1, 2, position=9).model(), length=128)
    assert reading.roles == []
    later = reading.scores["later sinks"].scores
    assert later[1, 2] == 1 and later.sum() == 1  # heads that attend evenly have none, at early tokens neither
    where = next(p for p in reading.panels if p.title == "Where later sinks stand")
    assert [x for x, y in where.series["later sinks"] if y] == [9]


def test_a_head_that_looks_at_the_token_before_has_no_sinks():
    reading = read(Planted().previous(0, 1).model(), length=128)
    assert reading.roles == [] and float(reading.scores["later sinks"].scores.sum()) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_random_weights_have_no_role(family):
    assert read(fv.tiny(family)).roles == []


def test_numbers_are_those_of_eager_attention(monkeypatch):
    monkeypatch.setattr("foveate.probes.watch.BLOCK", 700)  # several blocks of queries
    model = fv.tiny("llama")
    data = Data.of(model, fv.tiny_tokenizer(), length=32, passages=1)
    reading = Sinks().measure(model, data)
    sink, peak, later = torch.zeros(4, 4), torch.zeros(5), torch.zeros(4, 4)
    model.set_attn_implementation("eager")
    for stream in ("prose", "code"):
        with torch.no_grad():
            out = model(data.stream(stream, model), output_attentions=True, output_hidden_states=True)
        for layer, weights in enumerate(out.attentions):
            sink[layer] += weights[0, :, 8:, 0].mean(-1) / 2
            for head in range(4):
                for s in range(1, 16):
                    even = sum(1 / (q + 1) for q in range(s, 32)) / (32 - s)
                    later[layer, head] += float(weights[0, head, s:, s].mean() > 5 * even) / 2
        # The last of hidden_states is after the final norm, so it is left out.
        for layer, hidden in enumerate(out.hidden_states[:-1]):
            norms = hidden[0].norm(dim=-1)
            peak[layer] += norms[0] / norms[1:].median() / 2
    torch.testing.assert_close(reading.scores["sink"].scores.float(), sink)
    torch.testing.assert_close(reading.scores["later sinks"].scores.float(), later)
    assert float(later.sum()) > 0
    shown = torch.tensor([y for _, y in reading.panels[0].series["residual"]])
    torch.testing.assert_close(shown[:-1], peak[:-1])


def test_a_drained_value_is_seen():
    model = fv.tiny("llama")
    data = Data.of(model, fv.tiny_tokenizer(), length=32, passages=1)
    before = Sinks().measure(model, data).scores["value drain"].scores
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda module, args, out: out * _but_first(out))
    after = Sinks().measure(model, data).scores["value drain"].scores
    torch.testing.assert_close(1 - after[1], (1 - before[1]) * 0.1, rtol=1e-4, atol=1e-5)


def _but_first(out):
    scale = torch.ones(out.shape[1], 1)
    scale[0] = 0.1
    return scale


def test_an_alpha_that_makes_every_token_a_sink_gets_a_sentence():
    with pytest.raises(FoveateError, match="above 1"):
        Sinks(alpha=0.5)


def test_the_claim_runs(monkeypatch):
    monkeypatch.setattr(SinksArise, "steps", 3)
    monkeypatch.setattr(SinksArise, "seeds", 2)
    told = []
    bench = Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose"), told.append)
    finding = SinksArise().run(bench)
    assert len(finding.checks) == 11 and not finding.checks["all tiny models learn the task, to 0.1 nats"]
    assert told == sorted(told) and told[-1] == 1
