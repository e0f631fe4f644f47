"""Logit lens: the layer that writes the prediction is found, and at the end the lens is the model."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.patching import Site, recorded
from foveate.models.planted import Planted
from foveate.models.tiny import TINY_FAMILIES
from foveate.probes import Data
from foveate.probes import logit_lens as room
from foveate.probes.logit_lens import Lens, LogitLens, lens, reached

TOKENIZER = fv.tiny_tokenizer()


def read(model, **settings):
    return LogitLens(**settings).measure(model, Data.of(model, TOKENIZER, length=64, passages=2))


@pytest.mark.parametrize("at", [0, 2])
def test_the_layer_that_writes_the_prediction_is_found(at):
    # Of every token a head of one layer says that it comes again; before, nothing is written, and token 0 is first.
    model = Planted(layers=4).head(at, 1, match=("position", "position"), move=("token", "out")).model()
    reading = read(model)
    assert reading.scores["becomes readable"].scores[:, 0].tolist() == [float(i == at) for i in range(4)]
    assert reading.metrics["layers until half of the guesses are the final ones"].value == at + 1
    assert reading.metrics["layers until a guess is the final one and stays"].value == at + 1


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_at_the_end_the_lens_is_the_model(family, monkeypatch):
    model, parts = fv.tiny(family), fv.anatomy(fv.tiny(family))
    ids = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(0))
    sites = [Site("residual", at) for at in range(5)]
    with torch.no_grad(), recorded(model, sites) as values:
        logits = model(ids, use_cache=False).logits[0]
    monkeypatch.setattr(room, "CHUNK", 5 * parts.vocab)  # 23 places in five chunks
    found = lens(parts, [values[site][0, :-1] for site in sites], ids[0, 1:])
    assert torch.equal(found.said[-1], logits[:-1].argmax(-1)) and found.kl[-1].abs().max() == 0
    assert torch.equal(found.right[-1], logits[:-1].argmax(-1) == ids[0, 1:])
    end = logits[:-1].log_softmax(-1)
    with torch.no_grad():
        norm = parts.final_norm(values[sites[2]][0, :-1])
        plain = parts.head(norm)
    cap = getattr(model.config, "final_logit_softcapping", None)
    plain = (plain if cap is None else cap * (plain / cap).tanh()).log_softmax(-1)
    expected = torch.nn.functional.kl_div(plain, end, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.kl[2], expected, atol=1e-5, rtol=1e-4)


def test_settled_is_from_where_it_stays():
    said = torch.tensor([[5, 1, 1], [2, 5, 2], [5, 5, 3], [5, 5, 4]])
    assert Lens(said, said > 0, said.float()).settled().tolist() == [2, 1, 3]
    assert reached(torch.tensor([0.1, 0.2]), 0.5) == 2


def test_every_so_many_tokens_are_read():
    model = fv.tiny("llama")
    assert read(model, every=4).setting["places"] == 2 * 15 and read(model, every=100).setting["places"] == 2
    rows = read(model, every=4).panels[-1]
    assert len(rows.rows) <= room.SHOWN and all(len(row) == len(rows.columns) for row in rows.rows)


def test_bad_input_gets_a_sentence():
    with pytest.raises(FoveateError, match="every=0 is no distance"):
        LogitLens(every=0)
    model = fv.tiny("llama")
    model.lm_head = torch.nn.Linear(32, 260)
    with pytest.raises(FoveateError, match="64 and 32 channels"):
        LogitLens().check(model, Data.of(model, TOKENIZER, length=64))


def test_the_claim_runs(monkeypatch):
    from foveate.claims import CLAIMS
    from foveate.data.text import load_text
    from foveate.tasks.base import Bench

    monkeypatch.setattr(room, "PASSAGES", 1)
    finding = CLAIMS["logit-lens"]().run(Bench(fv.tiny("llama", num_hidden_layers=10), TOKENIZER, load_text()))
    assert len(finding.checks) == 6
