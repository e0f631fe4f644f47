"""`fv.read`: what is read, the folder where it goes on, and a sentence for every bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import foveate as fv
from foveate.errors import FoveateError
from foveate.probes import Data, Probe, Reading
from foveate.probes.base import PROBES
from foveate.probes.induction import Induction
from foveate.read import Readings, read

GIVEN = {"tokenizer": fv.tiny_tokenizer(), "length": 64, "passages": 2, "show": False}


@pytest.fixture(scope="module")
def model():
    return fv.planted()


@pytest.fixture
def counted(monkeypatch):
    """The probes that passes were made for."""
    passes: list[str] = []
    module = sys.modules["foveate.read"]
    watch_all = module.watch_all

    def noting(model, data, watchers):
        passes.extend(watcher.name for watcher in watchers)
        return watch_all(model, data, watchers)

    monkeypatch.setattr(module, "watch_all", noting)
    return passes


def test_what_was_planted_is_on_the_map(model):
    readings = read(model, ["induction"], **GIVEN)
    assert {(r.role, r.layer, r.unit) for r in readings.roles} >= {("induction", 1, 3), ("previous token", 0, 1)}
    assert "induction (1)" in readings.summary() and "of 12 heads" in readings.summary()
    assert readings.scores("induction.previous").scores.shape == (3, 4)
    frame = readings.to_frame()
    assert list(frame.columns) == ["probe", "score", "kind", "layer", "unit", "value", "roles"]
    assert "induction" in set(frame["roles"])
    assert "<svg" in readings._repr_html_()


def test_the_passage_is_the_attention_of_every_head(model):
    import base64

    readings = read(model, ["induction"], passage="abcabc", **GIVEN)
    assert readings.passage.tokens == list("abcabc")
    head = base64.b64decode(readings.passage.heads[0][1])  # it looks at the token before
    rows = [head[q * (q + 1) // 2 : (q + 1) * (q + 2) // 2] for q in range(6)]
    assert [max(range(len(row)), key=row.__getitem__) for row in rows] == [0, 0, 1, 2, 3, 4]
    assert all(abs(sum((b / 255) ** 2 for b in row) - 1) < 0.05 for row in rows)


def test_a_reading_goes_on_where_it_was(model, tmp_path, counted):
    first = read(model, ["induction"], out=tmp_path, **GIVEN)
    assert {p.name for p in tmp_path.iterdir()} == {"reading.json", "anatomy.html"}
    again = read(model, ["induction"], out=tmp_path, **GIVEN)
    assert counted == ["induction"]
    assert again["induction"].to_json() == first["induction"].to_json()
    loaded = Readings.load(tmp_path)
    assert loaded.to_json() == again.to_json()
    torch.testing.assert_close(
        loaded.scores("induction.induction").scores.double(),
        first.scores("induction.induction").scores,
        rtol=1e-5,
        atol=1e-8,
    )


def test_another_setting_is_refused(model, tmp_path):
    read(model, ["induction"], out=tmp_path, **GIVEN)
    before = (tmp_path / "reading.json").read_bytes()
    with pytest.raises(FoveateError, match="seed.*another --out"):
        read(model, ["induction"], out=tmp_path, seed=1, **GIVEN)
    with pytest.raises(FoveateError, match="another --out"):
        read(fv.tiny("llama"), ["induction"], out=tmp_path, **GIVEN)
    assert (tmp_path / "reading.json").read_bytes() == before


def test_what_was_measured_before_a_stop_is_kept(model, tmp_path, monkeypatch):
    class Stops(Probe):
        claim, title, name = "none", "never", "stops"

        def measure(self, model, data):
            raise KeyboardInterrupt

    monkeypatch.setattr(PROBES, "_classes", {**PROBES.all(), "stops": Stops})
    with pytest.raises(KeyboardInterrupt):
        read(model, [Induction(), Stops()], out=tmp_path, **GIVEN)
    assert list(json.loads((tmp_path / "reading.json").read_text())["readings"]) == ["induction"]
    assert not (tmp_path / ".foveate-lock").exists()


def test_a_probe_that_nobody_named_is_left_out_with_its_reason(model, monkeypatch):
    class Cannot(Induction):
        def check(self, model, data):
            raise FoveateError("this model has no such part: take another.")

    Cannot.name = "cannot"
    monkeypatch.setattr(PROBES, "_classes", {"induction": Induction, "cannot": Cannot})
    readings = read(model, **GIVEN)
    assert list(readings) == ["induction"] and readings.skipped == {
        "cannot": "this model has no such part: take another."
    }
    with pytest.raises(FoveateError, match="no such part"):
        read(model, ["induction", "cannot"], **GIVEN)


def test_watchers_share_one_pass(model, monkeypatch):
    class Other(Induction):
        pass

    Other.name = "other"
    monkeypatch.setattr(PROBES, "_classes", {"induction": Induction, "other": Other})
    forwards = []
    handle = model.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        both = read(model, ["induction", "other"], **GIVEN)
    finally:
        handle.remove()
    assert len(forwards) == 2 + 1  # two passages, and the passage of the page
    assert torch.equal(both.scores("induction.previous").scores, both.scores("other.previous").scores)


def test_bad_input_is_a_sentence_before_any_work(model, tmp_path):
    for given, sentence in [
        ({"probes": ["indction"]}, "did you mean induction"),
        ({"probes": ["induction", "induction"]}, "twice"),
        ({"probes": []}, "no probe was asked for"),
        ({"probes": ["induction"], "passage": "  "}, "passage is empty"),
        ({"probes": ["induction"], "text": "absent.txt"}, "no text"),
        ({"probes": ["induction"], "length": 4}, "at least 16 tokens"),
    ]:
        with pytest.raises(FoveateError, match=sentence):
            read(model, **{**GIVEN, **given, "out": tmp_path / "out"})
        assert not (tmp_path / "out").exists()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FoveateError, match="not empty"):
        read(model, ["induction"], out=tmp_path, **GIVEN)


def test_a_text_that_is_too_short_is_told(model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short\n" * 8)
    with pytest.raises(FoveateError, match="longer text"):
        Data(fv.tiny_tokenizer(), fv.load_text(str(short)), length=64).stream("mine", model)


def test_a_folder_in_use_is_told(model, tmp_path):
    with FileLock(tmp_path / ".foveate-lock"), pytest.raises(FoveateError, match="in use"):
        read(model, ["induction"], out=tmp_path, **GIVEN)


def test_a_damaged_reading_is_told(model, tmp_path):
    (tmp_path / "reading.json").write_text("{")
    with pytest.raises(FoveateError, match="damaged"):
        read(model, ["induction"], out=tmp_path, **GIVEN)


def test_an_encoder_is_told(tmp_path):
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(FoveateError, match="no causal language model"):
        read(model, ["induction"], **GIVEN)


def test_nothing_clear_is_said_so():
    readings = Readings("m", "m", 2, 3, 3, "", {"induction": Reading("induction", "", "Nothing.")})
    assert readings.summary() == "No part is clear in any of the 6 heads."
    with pytest.raises(FoveateError, match="no probe"):
        readings["inducton"]


def test_a_read_only_place_is_told(model, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(FoveateError, match="written to"):
        read(model, ["induction"], out=Path(tmp_path / "x"), **GIVEN)


def cut(model, **keep):
    """A plan's file for a tiny model: kind -> the units of each layer that stay."""
    from foveate.plans import Plan

    return Plan.of(model, {kind: [torch.tensor(each) for each in rows] for kind, rows in keep.items()})


def test_a_model_without_some_attention_is_read(tmp_path):
    model = fv.tiny("llama")
    cut(model, attention=[[], [0], [0], [0]]).save(tmp_path / "plan.json")
    with fv.apply(model, f"plan:file={tmp_path / 'plan.json'}"):
        readings = read(model, ["induction", "sinks", "spread"], **GIVEN)
    assert readings.roles == [] and readings.passage.heads[0] == [] and len(readings.passage.heads[1]) == 4
    assert float(readings.scores("induction.previous").scores.max()) <= 1


def test_a_model_with_some_heads_cut_is_told_before_any_work(tmp_path):
    model = fv.tiny("llama")
    cut(model, kv_head=[[0], [0, 1], [0, 1], [0, 1]]).save(tmp_path / "plan.json")
    with fv.apply(model, f"plan:file={tmp_path / 'plan.json'}"):
        with pytest.raises(FoveateError, match="before its heads were cut"):
            read(model, ["induction"], out=tmp_path / "out", **GIVEN)
        assert not (tmp_path / "out").exists()
        readings = read(model, ["layers"], **GIVEN)  # it needs no heads
    assert readings.passage is None and "heads" in readings.skipped["passage"]


def test_a_model_in_training_mode_is_read_in_eval_and_left_as_it_was():
    model = fv.tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    model.lm_head.eval()
    first, again = (read(model, ["induction"], **GIVEN) for _ in range(2))
    assert first.passage == again.passage and torch.equal(
        first.scores("induction.previous").scores, again.scores("induction.previous").scores
    )
    assert model.training and not model.lm_head.training


def test_a_model_of_few_positions_is_read():
    model = fv.tiny("gpt2", max_position_embeddings=32)
    given = {**GIVEN, "length": None, "show": True}
    assert read(model, ["induction"], **given)["induction"].setting["length"] == 32


def test_a_passage_longer_than_the_context_is_told(tmp_path):
    with pytest.raises(FoveateError, match="64 tokens were asked for, and this model has 32 positions"):
        read(fv.tiny("gpt2", max_position_embeddings=32), ["induction"], out=tmp_path / "out", **GIVEN)
    assert not (tmp_path / "out").exists()


def test_a_reading_without_its_parts_is_damaged(model, tmp_path):
    read(model, ["induction"], out=tmp_path, **GIVEN)
    given = json.loads((tmp_path / "reading.json").read_text())
    for broken in ({k: v for k, v in given.items() if k != "asked"}, {**given, "readings": {"induction": {}}}):
        (tmp_path / "reading.json").write_text(json.dumps(broken))
        with pytest.raises(FoveateError, match="damaged"):
            Readings.load(tmp_path)
