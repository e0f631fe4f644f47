"""SnapKV: what the window attends to stays, in runs."""

from __future__ import annotations

import pytest
import torch

from foveate.cache.entries import CacheView
from foveate.errors import FoveateError
from foveate.methods import Recipe


def best(recipe, received, count, positions=None):
    """Positions of the `count` highest scores."""
    at = torch.arange(len(received)) if positions is None else torch.tensor(positions)
    view = CacheView(
        layer=0,
        keys=None,
        values=None,
        positions=at.int()[None, None],
        received=torch.tensor(received)[None, None],
        seen=torch.tensor([[[int(at.max()) + 1]]]),
        query=None,
        query_positions=None,
        valid=None,
        inv_freq=None,
        state={},
    )
    score = Recipe.of(recipe).methods[0].score(view)[0, 0]
    assert len(set(score.tolist())) == len(received), "scores tie"
    return sorted(at[score.topk(count).indices].tolist())


RECEIVED = [0.1, 0, 0.9, 0.2, 0, 0, 0.3, 0.4, 9.0, 9.0]


def test_the_window_and_the_neighbours_of_what_it_attends_to_stay():
    assert best("snapkv:keep=0.5,window=2,kernel=1", RECEIVED, 4) == [2, 7, 8, 9]
    assert best("snapkv:keep=0.5,window=2,kernel=3", RECEIVED, 5) == [1, 2, 3, 8, 9]
    # means: .03 .33 .37 .37 .07 .1 .23 .23
    assert best("snapkv:keep=0.5,window=2,kernel=3,pooling=mean", RECEIVED, 4) == [2, 3, 8, 9]


def test_neighbours_of_equal_score_go_by_their_own():
    assert best("snapkv:keep=0.5,window=2,kernel=3", RECEIVED, 4) == [2, 3, 8, 9]


def test_empty_slots_are_no_neighbours_and_the_newest_of_a_long_window_stay():
    assert best("snapkv:keep=0.5,window=2,kernel=3", [7.0, 0.1, 0.2, 0.4, 0.1, 0], 4, [-1, 3, 4, 5, 6, 7]) == [
        4,
        5,
        6,
        7,
    ]
    assert best("snapkv:keep=0.5,window=32", RECEIVED, 3) == [7, 8, 9]


@pytest.mark.parametrize("field", ["window=0", "kernel=4", "kernel=0", "pooling=sum"])
def test_bad_fields_get_a_sentence(field):
    with pytest.raises(FoveateError, match=field.split("=")[0]):
        Recipe.of(f"snapkv:keep=0.2,{field}")
