import pytest
import torch

from foveate.train import Settings, Sizes, build
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import by_seed, differences, held_bytes, over_seeds

CPU = torch.device("cpu")


def test_over_seeds_is_students_interval():
    metric = over_seeds([1.0, 2.0, 3.0, 4.0])
    half = 3.182 * 1.2909944487 / 2  # t(3), the standard deviation, sqrt(4)
    assert metric.value == 2.5
    assert metric.high == pytest.approx(2.5 + half) and metric.low == pytest.approx(2.5 - half)
    assert over_seeds([5.0]).low == 5.0


def test_all_models_of_a_seed_see_the_same(monkeypatch):
    told = []
    models = {"a": Sizes(width=32, heads=2), "b": Sizes(width=32, heads=2)}
    found = by_seed(
        "mqar:pairs=1,length=8,vocab=8",
        models,
        Settings(steps=2, batch=8),
        device=CPU,
        seeds=(0, 1),
        progress=told.append,
    )
    assert [len(each) for each in found.values()] == [2, 2]
    assert found["a"][0].report.losses == found["b"][0].report.losses
    assert found["a"][0].report.losses != found["a"][1].report.losses
    assert differences(found["a"], found["b"], "loss").high == 0
    assert told == sorted(told) and told[-1] == 1


def test_held_bytes_of_vectors_too():
    task = TRAIN_TASKS.parse("regression")
    assert held_bytes(build(task, Sizes(mixer="linear")), 8) == held_bytes(build(task, Sizes(mixer="linear")), 800)
