"""What every training task holds, and what each says of itself."""

import pytest
import torch

from foveate.errors import FoveateError
from foveate.train import Settings, build, fit
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.tasks.base import hashed
from foveate.train.tasks.listops import BLANK, value_of

CPU = torch.device("cpu")
ALL = sorted(TRAIN_TASKS.all())


def drawn(text, count=32, split="train", number=0, seed=0):
    return TRAIN_TASKS.parse(text).batch(count, split, number, CPU, seed)


@pytest.mark.parametrize("name", ALL)
def test_batches_hang_on_their_number_and_seed_alone(name):
    first, again = drawn(name), drawn(name)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets.nan_to_num(), again.targets.nan_to_num())
    assert not torch.equal(first.inputs, drawn(name, number=1).inputs)
    assert not torch.equal(first.inputs, drawn(name, seed=1).inputs)
    task = TRAIN_TASKS.parse(name)
    assert first.inputs.shape[:2] == (32, task.tokens)
    if task.vocabulary:
        assert first.inputs.min() >= 0 and first.inputs.max() < task.vocabulary
    else:
        assert first.inputs.shape[2] == task.sizes[0]


@pytest.mark.parametrize("name", [name for name in ALL if name != "lm"])
def test_no_example_is_of_two_splits(name):
    rows = {
        split: {tuple(row.flatten().tolist()) for number in range(3) for row in drawn(name, 64, split, number).inputs}
        for split in ("train", "validation", "test")
    }
    assert not rows["train"] & rows["test"] and not rows["train"] & rows["validation"]
    assert not rows["validation"] & rows["test"]
    assert all(rows.values())


def test_a_small_space_of_examples_is_still_split():
    task = "induction:length=4,vocab=6"  # some 50 texts: chance would draw the same ones in both splits
    train, test = ({tuple(r.tolist()) for r in drawn(task, 200, split).inputs} for split in ("train", "test"))
    assert train and test and not train & test


def test_equal_rows_have_equal_hashes_and_tenths_are_even():
    rows = torch.randint(0, 50, (20_000, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(hashed(rows), hashed(rows.clone()))
    counts = torch.bincount(hashed(rows) % 10, minlength=10)
    assert counts.min() > 1800 and counts.max() < 2200


@pytest.mark.parametrize("name", ALL)
def test_a_model_trains_on_it_and_is_judged(name):
    task = TRAIN_TASKS.parse(name)
    model = build(task)
    report = fit(model, task, Settings(steps=2, batch=8))
    figures = task.judge(model, count=16, batch=8)
    assert report.steps == 2 and task.better in figures
    assert all(each.low <= each.value <= each.high for each in figures.values())


# ---- mqar ------------------------------------------------------------------------------------------------------


def test_each_key_is_asked_for_once_and_the_answer_is_its_value():
    batch = drawn("mqar:pairs=5,length=40,vocab=64", 50)
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        values = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        asked = {row[i]: t for i, t in enumerate(targets) if t != -100}
        assert asked == values and len(values) == 5
        assert all(key < 32 for key in values) and all(value >= 32 for value in values.values())


def test_a_low_power_asks_early():
    near, far = (
        (drawn(f"mqar:pairs=2,length=64,power={power}", 400).targets != -100).float() @ torch.arange(64.0)
        for power in (0.01, 1.0)
    )
    assert near.mean() < 0.7 * far.mean()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mqar:pairs=8,length=30", "even length of 32"),
        ("mqar:pairs=8,length=33", "even length"),
        ("mqar:pairs=40,length=160,vocab=64", "vocab of 83"),
        ("selective-copying:items=0", "items must be"),
        ("induction:length=2", "length and vocab"),
        ("listops:depth=0", "depth must be"),
        ("regression:noise=0", "noise above 0"),
        ("dag-search:ahead=20", "need 42 vertices"),
        ("lm:length=0", "length must be"),
    ],
)
def test_what_cannot_be_is_a_sentence(text, said):
    with pytest.raises(FoveateError, match=said):
        TRAIN_TASKS.parse(text)


# ---- the others ------------------------------------------------------------------------------------------------


def test_selective_copying_asks_for_what_was_no_noise_in_its_order():
    batch = drawn("selective-copying:items=4,length=20", 30)
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert [token for token in row[:20] if token] == [t for t in targets if t != -100]
        assert row[20:] == [1] * 4


def test_induction_asks_for_what_followed():
    batch = drawn("induction:length=20,vocab=8", 30)
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert row[-1] == 0 and targets[-1] == row[row.index(0) + 1] and row.count(0) == 2


def test_listops_values_are_those_of_the_definition():
    batch = drawn("listops:depth=4,arguments=3,length=60", 60)
    for row, value in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert value_of([token for token in row if token != BLANK]) == value
    assert len(set(batch.targets.tolist())) > 5


def test_dag_search_has_one_way_and_its_first_step_is_asked_for():
    task = TRAIN_TASKS.parse("dag-search:ahead=3,branches=3,others=5")
    batch = task.batch(60, "train", 0, CPU)
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        edges = [tuple(row[i + 1 : i + 3]) for i in range(0, len(row) - 3, 3)]
        _, goal, start = row[-3:]

        def ways(vertex, goal=goal, edges=edges):
            return [[vertex]] if vertex == goal else [[vertex, *w] for a, b in edges if a == vertex for w in ways(b)]

        found = {tuple(way) for way in ways(start)}
        assert {way[1] for way in found} == {targets[-1]}
        assert all(len(way) == 4 for way in found)
        assert sum(a == start for a, _ in edges) == 3  # the other branches are there


def test_ridge_is_the_closed_form_and_bayes_is_no_worse():
    task = TRAIN_TASKS.parse("regression:size=3,points=8,pool=4")
    batch = task.batch(256, "train", 0, CPU)
    x, y = batch.inputs[:, 0::2, :3], batch.targets[:, 0::2, 0]
    answers = task.ridge(x, y)
    for point in (0, 1, 5):
        before, said = x[0, :point].double(), y[0, :point].double()
        w = torch.linalg.solve(before.T @ before + task.noise**2 * 3 * torch.eye(3).double(), before.T @ said)
        assert answers[0, point] == pytest.approx(float(w @ x[0, point].double()), abs=1e-5)
    scores = task.scores(batch.inputs[..., -1:] * 0, batch)
    assert scores["bayes"].mean() < scores["ridge"].mean() < scores["loss"].mean()


def test_bayes_with_a_pool_is_the_posterior_mean():
    task = TRAIN_TASKS.parse("regression:size=2,points=4,pool=3")
    batch = task.batch(4, "train", 0, CPU)
    x, y = batch.inputs[:, 0::2, :2], batch.targets[:, 0::2, 0]
    pool, spread = task.functions(CPU), task.noise * 2**0.5
    normal = torch.distributions.Normal(0, spread)
    likely = torch.stack([normal.log_prob(y[0, :2] - x[0, :2] @ w).sum() for w in pool]).softmax(0)
    expected = (likely * (pool @ x[0, 2])).sum()
    assert task.bayes(x, y)[0, 2] == pytest.approx(float(expected), abs=1e-4)


def test_a_language_models_text_is_parted_for_good():
    task = TRAIN_TASKS.parse("lm:text=prose,length=16")
    from foveate.data.text import load_text

    text = load_text("prose")
    parts = {"train": text.calibration, "validation": text.calibration, "test": text.evaluation}
    for split, part in parts.items():
        batch = task.batch(4, split, 0, CPU)
        for row, targets in zip(batch.inputs, batch.targets, strict=True):
            assert torch.equal(row[1:], targets[:-1])
            assert bytes(row.tolist()) in part.encode()


def test_a_model_tokenizers_tokens(monkeypatch):
    from foveate.models.tiny import tiny_tokenizer
    from foveate.train.tasks import lm

    monkeypatch.setattr(lm, "_tokenizer", lambda name: tiny_tokenizer())
    task = TRAIN_TASKS.parse("lm:text=prose,length=8,unit=some-model")
    assert task.vocabulary == 259 and task.batch(2, "test", 0, CPU).inputs.max() < 256
