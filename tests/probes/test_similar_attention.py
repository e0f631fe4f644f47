"""Similar attention: layers that attend alike are found, and alike is what echo calls so."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.convert.echo import attention_similarity
from foveate.errors import FoveateError
from foveate.models.planted import Planted
from foveate.probes import Data, watch
from foveate.probes.similar_attention import SimilarAttention, shared_nll

TOKENIZER = fv.tiny_tokenizer()


def read(model, length=64, **settings):
    return SimilarAttention(**settings).measure(model, Data.of(model, TOKENIZER, length=length, passages=1))


def heads(circuit, layer, backs, order=(0, 1, 2, 3)):
    """Heads that look so many tokens back."""
    for head, back in zip(order, backs, strict=True):
        circuit.head(layer, head, match=("position", "position"), shift=-back)
    return circuit


def test_the_layer_that_looks_as_the_one_before_is_found():
    circuit = Planted(layers=4)
    heads(circuit, 0, (0, 1, 2, 3))
    heads(circuit, 1, (4, 5, 6, 7))
    heads(circuit, 2, (4, 5, 6, 7))  # as layer 1
    heads(circuit, 3, (4, 5, 6, 7), order=(1, 2, 3, 0))  # the same, but by other heads
    reading = read(circuit.model())
    assert [(r.layer, r.role) for r in reading.roles] == [(2, "echo")]
    own = reading.scores["own attention"].scores[:, 0]
    assert own[0].isnan() and own[2] < 0.01 and own[1] > 0.8 and own[3] > 0.8
    grid = torch.tensor(reading.panels[0].values)
    assert grid[1, 2] > 0.99 and grid[0, 3] < 0.2 and torch.equal(grid, grid.T)


def test_layers_that_all_look_evenly_are_alike_and_no_echo():
    reading = read(Planted(layers=3).model())
    assert reading.metrics["alike to the layer before, mean"].value > 0.99 and not reading.roles


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_it_is_what_echo_measures(family, monkeypatch):
    model = fv.tiny(family)
    data = Data.of(model, TOKENIZER, length=48, passages=1)
    ids = data.stream("prose", model)
    monkeypatch.setattr(watch, "BLOCK", 4 * 48 * 10)  # in blocks of ten queries
    found = torch.tensor(SimilarAttention(queries=47).measure(model, data).panels[0].values)
    expected = attention_similarity(model, fv.anatomy(model).layers, ids).float()
    expected = (expected * 48 - 1) / 47  # echo counts the first token, which can't but look at itself
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_few_queries_say_about_the_same():
    few, all_ = (torch.tensor(read(fv.tiny("llama"), queries=n).panels[0].values) for n in (16, 63))
    assert (few - all_).abs().max() < 0.1


def test_an_attention_that_is_gone_is_like_none():
    model = fv.tiny("llama")
    with fv.apply(model, "drop-attention:keep=0.75", calibration=torch.arange(1, 65).unsqueeze(0)):
        gone = [type(layer.attention).__name__ for layer in fv.anatomy(model).layers].index("NoAttention")
        values = read(model).panels[0].values
    assert all(x is None for x in values[gone]) and values[(gone + 1) % 4][(gone + 1) % 4] is not None


def test_shared_attention_is_echo_of_one_layer():
    model = fv.tiny("llama")
    ids = torch.randint(3, 250, (1, 65), generator=torch.Generator().manual_seed(0))
    with fv.apply(model, "echo:layers=1", calibration=ids):
        at = [type(layer.attention).__name__ for layer in fv.anatomy(model).layers].index("EchoAttention")
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].detach(), ids[0, 1:])
    assert shared_nll(model, ids, at)[0] == pytest.approx(64 * float(losses), rel=1e-5)
    assert shared_nll(model, ids, None)[0] != pytest.approx(64 * float(losses), rel=1e-6)
    assert shared_nll(model, ids, at, shift=1) != shared_nll(model, ids, at)


def test_bad_input_gets_a_sentence():
    with pytest.raises(FoveateError, match="looks at none"):
        SimilarAttention(queries=0)


def test_the_claim_runs():
    from foveate.claims import CLAIMS
    from foveate.data.text import load_text
    from foveate.tasks.base import Bench

    bench = Bench(fv.tiny("llama", num_hidden_layers=6), TOKENIZER, load_text())
    with pytest.raises(FoveateError, match="deeper model"):
        CLAIMS["similar-attention"]().run(Bench(fv.tiny("llama"), TOKENIZER, load_text()))
    assert len(CLAIMS["similar-attention"]().run(bench).checks) == 4
