"""The grid: what a cell's id depends on, and that profiles are sound."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from foveate.compare import grid
from foveate.compare.grid import PROFILES, Cell, cells, parse_recipes, parse_tasks, profile, weights_digest
from foveate.data.text import Text
from foveate.errors import FoveateError
from foveate.models.tiny import tiny

CELL = Cell("tiny", "full", "perplexity", {"seed": 0, "dtype": "float32"})


def test_id_is_the_same_in_every_process_and_depends_on_everything():
    assert CELL.id == dataclasses.replace(CELL, setting={"dtype": "float32", "seed": 0}).id
    others = [
        dataclasses.replace(CELL, **change)
        for change in (
            {"model": "other"},
            {"recipe": "window:keep=0.5"},
            {"task": "passkey"},
            {"setting": {"seed": 1, "dtype": "float32"}},
        )
    ]
    assert len({cell.id for cell in [CELL, *others]}) == 5
    assert len(CELL.id) == 16 and int(CELL.id, 16) >= 0


def test_weights_digest_sees_one_changed_weight_and_the_configuration():
    model, twin = tiny("llama"), tiny("llama")
    assert weights_digest(model) == weights_digest(twin) != weights_digest(tiny("llama", seed=1))
    with torch.no_grad():
        next(twin.parameters())[0, 0] += 1e-3
    assert weights_digest(model) != weights_digest(twin)
    twin = tiny("llama")
    twin.config.rms_norm_eps = 0.1
    assert weights_digest(model) != weights_digest(twin)


def test_weights_digest_does_not_depend_on_threads():
    model = tiny("llama")
    before = torch.get_num_threads()
    digests = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        digests.add(weights_digest(model))
    torch.set_num_threads(before)
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_digest_reads_every_dtype(dtype):
    assert weights_digest(tiny("llama").to(dtype)) != weights_digest(tiny("llama"))


def test_setting_names_what_determines_a_result():
    text = Text("mine", "a", "b")
    setting = grid.setting_of(tiny("llama"), text, 3)
    given = [setting[key] for key in ("dtype", "device", "seed", "text")]
    assert given == ["float32", "cpu", 3, "mine"]
    assert setting["text_digest"] != grid.setting_of(tiny("llama"), Text("mine", "a", "c"), 3)["text_digest"]
    assert {"foveate", "torch", "transformers", "weights"} <= setting.keys()


def test_recipes_and_tasks_stand_once_in_one_spelling():
    recipes = parse_recipes(["full", "window:entries=8,keep=none", "window:entries=8", "full"])
    assert [recipe.to_text() for recipe in recipes] == ["full", "window:entries=8"]
    tasks = parse_tasks(["perplexity:tokens=4096", "perplexity", "perplexity:tokens=64"])
    assert [task.to_text() for task in tasks] == ["perplexity", "perplexity:tokens=64"]
    grid_cells = cells("tiny", recipes, tasks, {})
    assert [(cell.task, cell.recipe) for cell in grid_cells][:2] == [
        ("perplexity", "full"),
        ("perplexity", "window:entries=8"),
    ]


@pytest.mark.parametrize("parse", [parse_recipes, parse_tasks])
def test_an_empty_list_is_refused(parse):
    with pytest.raises(FoveateError, match="at least one"):
        parse([])


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_parse_and_hold_the_full_model(name):
    assert "full" in {recipe.to_text() for recipe in parse_recipes(profile(name).recipes)}
    assert parse_tasks(profile(name).tasks)


def test_an_unknown_profile_gets_the_nearest():
    with pytest.raises(FoveateError, match="did you mean quick"):
        profile("quik")
