"""Recipes in their three forms, the registry's errors, unit scores, and apply."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate as fv
from foveate.errors import FoveateError
from foveate.methods import METHODS, Method, Recipe, UnitScores
from foveate.specs import split_specs

FRACTION = st.floats(0.01, 1.0).map(lambda x: round(x, 3))


@st.composite
def recipes(draw):
    before = draw(st.lists(st.sampled_from(["drop-attention", "skip-layers"]), max_size=3))
    methods = [METHODS.build(name, {"keep": draw(FRACTION)}) for name in before]
    policy = draw(st.sampled_from(["full", "window", "streaming", "h2o", "random"]))
    if policy == "full":
        return Recipe((*methods, METHODS.build("full", {})))
    fields = draw(st.fixed_dictionaries({}, optional={"sinks": st.integers(0, 9), "recent": FRACTION}))
    budget = draw(st.one_of(st.tuples(st.just("keep"), FRACTION), st.tuples(st.just("entries"), st.integers(10, 99))))
    return Recipe((*methods, METHODS.build(policy, fields | dict([budget]))))


@given(recipes())
def test_text_yaml_and_objects_round_trip(recipe):
    assert Recipe.of(recipe.to_text()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.of(list(recipe.methods)) == recipe
    assert hash(Recipe.of(recipe.to_text())) == hash(recipe)


@given(st.lists(recipes(), min_size=1, max_size=5))
def test_a_list_of_recipes_splits_where_it_should(several):
    assert [Recipe.of(t) for t in split_specs(",".join(r.to_text() for r in several))] == several


def test_equal_recipes_have_equal_texts():
    assert Recipe.of("h2o:recent=0.5,keep=0.20") == Recipe.of(" h2o:keep=.2 ")
    assert Recipe.of("h2o:recent=0.5,keep=0.20").to_text() == "h2o:keep=0.2"


def test_yaml_files_and_what_people_write(tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text("- drop-attention: {keep: 0.8}\n- h2o:keep=0.2\n")
    assert Recipe.of(path) == Recipe.of(str(path)) == Recipe.of("drop-attention:keep=0.8+h2o:keep=0.2")


@pytest.mark.parametrize(
    "what,says",
    [
        ("h20:keep=0.2", "h2o"),
        ("h2o:kep=0.2", "keep"),
        ("h2o:keep=lots", "can't be read"),
        ("h2o:0.2", "lacks a field name"),
        ("h2o:", "colon"),
        ("h2o:keep=0.2,keep=0.3", "twice"),
        ("skip-layers", "needs keep"),
        ("full:keep=1", "has no field"),
        ("", "no recipe"),
        ("full++full", "no recipe"),
        ("nowhere.yaml", "can't be read"),
    ],
)
def test_errors_are_sentences(what, says):
    with pytest.raises(FoveateError, match=says):
        Recipe.of(what)


@pytest.mark.parametrize(
    "text", ["h2o", "- [1]", "- h2o: 3", "- {a: {}, b: {}}", "[", "- !!python/object:os.system {}", ""]
)
def test_bad_yaml_gets_a_sentence(text):
    with pytest.raises(FoveateError):
        Recipe.from_yaml(text)


def test_every_method_says_where_it_comes_from():
    for name, cls in METHODS.all().items():
        assert cls.name == name and cls.role and cls.claim and cls.__doc__
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
        if cls.paper is not None:
            assert cls.paper.url.startswith("https://") and 1980 < cls.paper.year < 2100
        assert issubclass(cls, Method)


def test_unit_scores_keep_the_highest_of_those_that_are_there():
    scores = UnitScores("head", torch.tensor([[3.0, 1.0], [float("nan"), 2.0]]))
    assert scores.keep(0.67).tolist() == [[True, False], [False, True]]
    assert scores.keep(0.01).sum() == 1
    assert scores.keep(1.0).sum() == 3


def test_apply_takes_methods_in_order_and_undoes_them_when_one_fails():
    model = fv.tiny("llama")
    before = [type(layer.self_attn) for layer in model.model.layers]
    calibration = torch.arange(3, 35).unsqueeze(0)
    with pytest.raises(FoveateError, match="two cache policies|only one"):
        fv.apply(model, "window:keep=0.5+h2o:keep=0.5").__enter__()
    with (
        pytest.raises(FoveateError, match="in force"),
        fv.apply(model, "window:keep=0.5"),
        fv.apply(model, "drop-attention:keep=0.5+h2o:keep=0.5", calibration=calibration),
    ):
        pass
    assert [type(layer.self_attn) for layer in model.model.layers] == before
