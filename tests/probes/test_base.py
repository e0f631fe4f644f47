"""What probes are given and what they give: streams of passages, readings as data, and pictures."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.data.text import Text, tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import UnitScores
from foveate.probes.base import Data, Grid, Lines, Marked, Reading, Role, Rows, clear_heads, heat_map, named

NAN = float("nan")


@pytest.fixture(scope="module")
def model():
    return fv.tiny("llama")


def data(model, **given):
    return Data.of(model, fv.tiny_tokenizer(), **{"length": 32, "passages": 3, **given})


# ---- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prose", "code", "mine"])
def test_passages_are_calibration_text_spread_evenly(name, model):
    given = data(model)
    ids = given.stream(name, model)
    assert ids.shape == (3, 32) and ids.dtype == torch.long
    text = fv.load_text("prose" if name == "mine" else name)
    whole = tokens(text.calibration, given.tokenizer)[0]
    room = len(whole) - 32
    for row, start in zip(ids, (0, room // 2, room), strict=True):
        assert torch.equal(row, whole[start : start + 32])


def test_one_passage_is_the_first(model):
    one, three = (data(model, passages=n).stream("prose", model) for n in (1, 3))
    assert torch.equal(one[0], three[0]) and len(one) == 1


def test_mine_is_the_readers_text_also_by_its_name(model):
    mine = Text("novel", calibration="abcdefghij" * 10, evaluation="never read " * 10)
    given = Data(fv.tiny_tokenizer(), mine, length=20, passages=2)
    assert given.tokenizer.decode(given.stream("mine", model)[0]) == "abcdefghij" * 2
    assert torch.equal(given.stream("novel", model), given.stream("mine", model))
    assert not torch.equal(given.stream("prose", model), given.stream("mine", model))


def test_the_halves_of_repeat_are_the_same(model):
    ids = data(model, length=64).stream("repeat", model)
    assert ids.shape == (3, 64) and torch.equal(ids[:, :32], ids[:, 32:])
    assert len({tuple(row.tolist()) for row in ids}) == 3
    assert ids.unique().numel() > 60  # not a few tokens over and over


def test_repeat_is_drawn_by_the_seed(model):
    first, again, other = (data(model, seed=seed).stream("repeat", model) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_repeat_has_no_special_tokens_and_none_that_the_model_lacks(model):
    given = data(model, passages=50)
    special = set(given.tokenizer.all_special_ids)
    assert special and not special & set(given.stream("repeat", model).flatten().tolist())
    assert given.ordinary(model).tolist() == list(range(256))
    small = fv.tiny("llama", vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    assert given.ordinary(small).max() == 99 and given.stream("repeat", small).max() < 100


def test_passages_are_no_longer_than_the_models_positions():
    short = fv.tiny("gpt2", max_position_embeddings=24)
    for name in ("prose", "repeat"):
        assert data(short).stream(name, short).shape == (3, 24)


def test_too_short_a_text_is_a_sentence(model):
    given = Data(fv.tiny_tokenizer(), Text("note", "a short note", "b" * 100), length=32)
    with pytest.raises(FoveateError, match=r"text note has 12 tokens, and 4 passages of 32 .* at most 3 tokens\."):
        given.stream("mine", model)


def test_a_text_that_is_not_there_is_a_sentence(model):
    with pytest.raises(FoveateError, match="there is no text nowhere.txt"):
        data(model).stream("nowhere.txt", model)


@pytest.mark.parametrize("wrong", [{"length": 15}, {"passages": 0}])
def test_too_little_to_read_is_a_sentence(wrong, model):
    with pytest.raises(FoveateError, match="give 1 passage or more of at least 16 tokens"):
        data(model, **wrong)


# ---- readings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def reading():
    return Reading(
        "mine",
        "What <b>is</b> it?",
        "Two & a half.",
        metrics={"part": Metric(0.5, 0.25, float("inf")), "none": Metric(NAN, NAN, NAN)},
        scores={
            "size": UnitScores("head", torch.tensor([[0.5, NAN], [1.25, -3.0]])),
            "<wide>": UnitScores("mlp", torch.tensor([[1.0], [2.0]])),
        },
        roles=[
            Role("head", 0, 0, "sink", 0.5, "Rests."),
            Role("head", 1, 0, "sink", 1.25, "Rests."),
            Role("head", 0, 0, "copy", 0.5, "Copies."),
            Role("mlp", 1, 0, "knows", 2.0, "Knows."),
        ],
        panels=[
            Lines("lines", "x", "y", {"a": [(0.0, 1.0), (1.0, NAN)]}),
            Rows("rows", ["a", "b"], [["x", 1], ["y", None]]),
            Marked("marked", ["a", "b"], [0.0, 1.0]),
            Grid("grid", "x", "y", [[0.0, None], [NAN, 1.0]]),
        ],
        setting={"least": 0.3, "streams": ("prose",), "at": torch.tensor(2), "part": np.float32(0.5)},
        seconds=1.23456,
    )


def test_a_reading_goes_through_json_and_back(reading):
    text = json.dumps(reading.to_json(), allow_nan=False)  # raises at a NaN
    again = Reading.from_json(json.loads(text))
    assert again.to_json() == reading.to_json()
    assert again.roles == reading.roles and again.seconds == 1.23
    assert again.metrics["part"].value == 0.5 and again.metrics["none"].value != again.metrics["none"].value
    size = again.scores["size"]
    assert size.kind == "head" and size.scores[0, 1].isnan() and size.scores[1].tolist() == [1.25, -3.0]
    assert [type(panel) for panel in again.panels] == [Lines, Rows, Marked, Grid]
    assert again.panels[3].values == [[0.0, None], [None, 1.0]]


def test_numbers_of_torch_and_numpy_become_pythons(reading):
    assert reading.to_json()["setting"] == {"least": 0.3, "streams": ["prose"], "at": 2, "part": 0.5}


def test_units_of_a_role_come_clearest_first(reading):
    assert reading.of_role("sink") == [(1, 0), (0, 0)] and reading.of_role("other") == []
    assert [role.name for role in reading.roles] == ["0.0", "1.0", "0.0", "mlp 1"]


def test_a_frame_has_a_row_for_each_unit_of_each_score(reading):
    frame = reading.to_frame()
    assert list(frame.columns) == ["score", "kind", "layer", "unit", "value", "roles"] and len(frame) == 6
    first, last = frame.iloc[0], frame.iloc[-1]
    assert (first.score, first.kind, first.layer, first.unit, first.value, first.roles) == (
        "size", "head", 0, 0, 0.5, "sink, copy",
    )  # fmt: skip
    assert (last.score, last.kind, last.layer, last["value"], last.roles) == ("<wide>", "mlp", 1, 2.0, "knows")
    assert frame.value.isna().sum() == 1


def test_a_notebook_shows_text_as_text(reading):
    shown = reading._repr_html_()
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in shown and "Two &amp; a half." in shown and "&lt;wide&gt;" in shown
    assert "<b>is</b>" not in shown and "<wide>" not in shown
    ElementTree.fromstring(shown)  # well-formed


def test_a_heat_map_has_a_cell_for_each_number_the_highest_darkest():
    picture = ElementTree.fromstring(heat_map(UnitScores("head", torch.tensor([[0.0, NAN, 2.0], [1.0, 0.5, 0.25]]))))
    cells = {each[0].text.split(": ")[0]: each.attrib for each in picture}
    assert set(cells) == {"head 0.0", "head 0.2", "head 1.0", "head 1.1", "head 1.2"}  # not the NaN
    shade = {name: float(each["fill-opacity"]) for name, each in cells.items()}
    assert shade["head 0.2"] == 1 and shade["head 0.0"] == 0.06 and shade["head 1.0"] == 0.53
    assert (cells["head 1.2"]["x"], cells["head 1.2"]["y"]) == ("24", "12")  # layers go down, units to the right
    assert (picture.attrib["width"], picture.attrib["height"]) == ("36", "24")


@pytest.mark.parametrize("values", [[[1.0, 1.0]], [[NAN, NAN]]])
def test_a_heat_map_of_equal_or_no_numbers(values):
    picture = ElementTree.fromstring(heat_map(UnitScores("<kind>", torch.tensor(values))))
    assert len(picture) == (2 if values[0][0] == 1 else 0)


def test_clear_heads_are_those_from_the_threshold_on():
    scores = UnitScores("head", torch.tensor([[0.3, 0.29], [NAN, 0.9]]))
    found = clear_heads(scores, 0.3, "sink", lambda s: f"{s:.1f}")
    assert [(r.layer, r.unit, r.words) for r in found] == [(1, 1, "0.9"), (0, 0, "0.3")]
    assert clear_heads(scores, 0.3, "sink", str, most=1) == clear_heads(scores, 0.8, "sink", str)


def test_named():
    units = [(0, index) for index in range(8)]
    assert named(units) == "0.0, 0.1, 0.2, 0.3, 0.4, 0.5 and 2 more"
    assert named(units[:2]) == "0.0, 0.1" and named([]) == ""
    assert named([Role("layer", 3, 0, "x", 1.0, ".")]) == "layer 3"
