from __future__ import annotations

import pytest
import torch

from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.models.tiny import tiny
from foveate.tasks import TASKS
from foveate.tasks.held import Held, _strings, held_positions


def test_the_full_cache_holds_everything(bench):
    outcome = Held(tokens=50).run(bench)
    held = outcome.artifacts["held"]
    assert held["of"] == 8 and held["heads"] == [8] * 50 and outcome.metrics["held_fraction"].value == 1
    assert "".join(held["tokens"]) == bench.text.evaluation[:50]


def test_streaming_holds_sinks_and_the_recent(bench):
    outcome = Held(tokens=40).measure(bench, Recipe.of("streaming:keep=0.25"))
    assert outcome.artifacts["held"]["heads"] == [8] * 4 + [0] * 30 + [8] * 6
    assert outcome.metrics["held_fraction"].value == 0.25


def test_keep_1_holds_everything(bench):
    outcome = Held(tokens=40).measure(bench, Recipe.of("h2o:keep=1"))
    assert outcome.metrics["held_fraction"].value == 1


def test_layers_without_attention_or_skipped_hold_nothing(bench):
    outcome = Held(tokens=40).measure(bench, Recipe.of("skip-layers:keep=0.5"))
    assert outcome.metrics["held_fraction"].value == 0.5
    ids = torch.arange(1, 65).unsqueeze(0)
    with apply(bench.model, "drop-attention:keep=0.75+streaming:keep=0.5", context=40, calibration=ids):
        outcome = Held(tokens=40).run(bench)
    assert max(outcome.artifacts["held"]["heads"]) == 6
    assert outcome.metrics["held_fraction"].value == pytest.approx(0.75 * 0.5)


@torch.no_grad()
def test_sliding_layers_hold_their_window():
    model = tiny("gemma2", sliding_window=16)
    cache = model(torch.arange(1, 41).unsqueeze(0), use_cache=True).past_key_values
    sliding, whole, *_ = held_positions(cache)
    assert sliding[0, 0].tolist() == list(range(25, 40)) and whole[0, 1].tolist() == list(range(40))


def test_pieces_can_be_read():
    class SentencePieces:
        def convert_ids_to_tokens(self, ids):
            return ["▁the", "cat", "<0xE2>"]

        def batch_decode(self, ids):
            return ["the", "cat", "\ufffd"]

    assert _strings([1, 2, 3], SentencePieces()) == [" the", "cat", "\ufffd"]  # type: ignore[arg-type]


def test_impossible_settings_are_refused():
    with pytest.raises(FoveateError, match="at least 2"):
        TASKS.parse("held:tokens=1")
