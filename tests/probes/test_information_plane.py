"""Information plane: the estimator against entropies by hand, the task, the training, and what is told of it."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.claims import CLAIMS
from foveate.errors import FoveateError
from foveate.methods import FUNCTIONS, techniques
from foveate.probes.base import Reading
from foveate.probes.information_plane import (
    ACTIVATIONS,
    FittingThenCompression,
    InformationPlane,
    _information,
    _Networks,
    binned,
    entropy,
    information_plane,
    mutual,
    patterns,
)
from foveate.tasks.base import Bench

# ---- the estimator, by hand -----------------------------------------------------------------------------------------


def test_entropies_by_hand():
    assert entropy(torch.zeros(7, dtype=torch.long)) == 0
    assert entropy(torch.arange(8)) == 3
    assert entropy(torch.tensor([5, 5, 5, 9])) == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


def test_mutual_information_by_hand():
    labels = torch.tensor([0, 0, 1, 1])
    assert mutual(labels, labels) == 1 and mutual(torch.zeros(4, dtype=torch.long), labels) == 0
    assert mutual(torch.tensor([0, 1, 0, 1]), labels) == 0  # independent
    assert mutual(torch.arange(4), labels) == 1  # no more than the label has
    # One of four labels in a cell of its own: H(T) = 0.811..., and half of the time one bit is left.
    assert mutual(torch.tensor([0, 0, 0, 1]), labels) == pytest.approx(entropy(torch.tensor([0, 0, 0, 1])) - 0.5)


def test_mutual_information_is_that_of_the_joint_table():
    draw = torch.Generator().manual_seed(0)
    cells, labels = torch.randint(6, (500,), generator=draw), torch.randint(2, (500,), generator=draw)
    joint = torch.zeros(6, 2, dtype=torch.float64)
    for t, y in zip(cells, labels, strict=True):
        joint[t, y] += 1 / 500
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    assert mutual(cells, labels) == pytest.approx(float((joint * (joint / apart).log2()).sum()))


def test_bins_are_equal_and_reach_to_both_ends():
    at = binned(torch.tensor([[-1.0], [-0.51], [-0.49], [0.49], [0.51], [1.0]]), 4, -1, 1)
    assert at.tolist() == [0, 0, 1, 2, 3, 3]
    assert len(binned(torch.linspace(-1, 1, 3001)[:, None], 30, -1, 1).unique()) == 30
    assert binned(torch.zeros(3, 2), 30, 0.0, 0.0).tolist() == [0, 0, 0]  # of a layer that is dead


def test_rows_share_a_cell_only_if_all_units_do():
    draw = torch.Generator().manual_seed(1)
    values = torch.rand(400, 10, generator=draw).round(decimals=1)  # with 100 bins: more cells than an int64 counts
    cells = binned(values, 100, 0, 1)
    values[200:] = values[:200]
    again = binned(values, 100, 0, 1)
    assert torch.equal(again[:200], again[200:])
    rows = (values * 100).long().clamp(0, 99)
    assert len(again.unique()) == len(rows.unique(dim=0)) and len(cells.unique()) > len(again.unique())


@pytest.mark.parametrize(("activation", "seen"), [("tanh", [2.0, 1.0]), ("relu", [1.0, 2.0])])
def test_bins_of_relu_reach_to_the_highest_of_all_training(activation, seen):
    """Four patterns, one unit; with ReLU, what is small beside the end of training is one bin."""
    first, last = torch.tensor([0.1, 0.3, 0.6, 0.9]), torch.tensor([0.1, 0.2, 0.9, 0.95])
    if activation == "relu":
        first, last = first, torch.tensor([0.0, 0.6, 1.2, 2.0])
    shots = [[first[None, :, None]], [last[None, :, None]]]
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0])
    of_input, of_label = _information(shots, activation, [4 if activation == "relu" else 8], labels, lambda done: None)
    assert next(iter(of_input.values()))[0, :, 0].tolist() == seen
    assert next(iter(of_label.values())).max() == 1


# ---- the task and the networks --------------------------------------------------------------------------------------


def test_the_patterns_are_all_there_is_and_half_are_one():
    x, y = patterns()
    assert x.shape == (4096, 12) and len(x.unique(dim=0)) == 4096 and x.abs().unique().tolist() == [1]
    assert y.unique().tolist() == [0, 1] and y.mean() == 0.5
    ones = (x > 0).sum(1)
    parts = [round(float(y[ones == count].mean()), 2) for count in (4, 5, 6, 7, 8)]
    assert parts == [0.0, 0.08, 0.47, 0.96, 1.0]


def test_a_step_is_sgd_on_each_network_alone():
    draw = torch.Generator().manual_seed(0)
    net = _Networks("tanh", [12, 4, 3, 1], 2, draw)
    x, y = torch.randn(2, 5, 12, generator=draw), torch.tensor([[0.0, 1, 1, 0, 1], [1.0, 1, 0, 0, 0]])
    for run in range(2):
        layers = [torch.nn.Linear(a, b) for a, b in ((12, 4), (4, 3), (3, 1))]
        for layer, w, b in zip(layers, net.weights, net.biases, strict=True):
            layer.weight.data, layer.bias.data = w[run].detach().T.clone(), b[run, 0].detach().clone()
        plain = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
        torch.testing.assert_close(net.logits(x)[run], plain(x[run])[:, 0])
        if run == 1:
            loss = torch.nn.BCEWithLogitsLoss()(plain(x[run])[:, 0], y[run])
            loss.backward()
            torch.optim.SGD(plain.parameters(), lr=0.3).step()
            gradients = net.step(x, y, 0.3)
            assert len(gradients) == 2  # the hidden layers'
            torch.testing.assert_close(gradients[0][run], layers[0].weight.grad.T)
            for layer, w, b in zip(layers, net.weights, net.biases, strict=True):
                torch.testing.assert_close(w[run].T, layer.weight)
                torch.testing.assert_close(b[run, 0], layer.bias)


@pytest.fixture(scope="module")
def seen():
    return information_plane(epochs=25, runs=2, bins=(30, 10), looks=6)


def test_it_has_the_shape_that_it_promises(seen):
    looks = len(seen.epochs)
    assert seen.epochs[0] == 0 and seen.epochs[-1] == 25 and seen.epochs == sorted(set(seen.epochs))
    for each in (*seen.of_input.values(), *seen.of_label.values(), seen.gradient_mean, seen.gradient_std):
        assert each.shape == (2, looks, 5) and each.dtype == torch.float64 and (each >= 0).all()
    assert seen.errors.shape == (2, looks, 2) and list(seen.of_input) == [30, 10]


def test_what_layers_know_obeys_the_theory(seen):
    for bins, x in seen.of_input.items():
        y = seen.of_label[bins]
        assert x.max() <= 12 and y.max() <= 1 + 1e-9 and (y <= x + 1e-9).all()
        assert (x[..., 0] > 11).all()  # ten units keep the patterns apart
    # Data processing: of exact states a later layer can't know more; of states in bins it could, but hardly does.
    assert (seen.of_input[30].diff(dim=-1) <= 1e-9).all()
    assert (seen.of_input[10] <= seen.of_input[30] + 1e-9).all()  # ten bins are made of three of the thirty


def test_the_networks_learn_and_layers_learn_of_the_label(seen):
    assert (seen.errors[:, -1] < 0.12).all() and (seen.errors[:, 0] > 0.3).all()
    assert (seen.of_label[30][:, -1, -1] > seen.of_label[30][:, 0, -1] + 0.2).all()
    assert (seen.ratio()[:, 0] > 1).all()  # at first, the batches agree


def test_draws_are_by_the_seed():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, same, other = (information_plane(epochs=1, runs=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.of_input[30], same.of_input[30]) and not torch.equal(one.of_input[30], other.of_input[30])
    assert not torch.equal(one.errors[0], one.errors[1])


def test_compression_is_the_way_down_from_the_top():
    x = torch.tensor([[[3.0, 2.0], [5.0, 2.5], [4.0, 3.0]]])
    seen = InformationPlane([0, 1, 2], {30: x, 5: x / 2}, {}, x, x, x, {})
    assert seen.compression().tolist() == [[1.0, 0.0]] and seen.compression(5).tolist() == [[0.5, 0.0]]


def test_the_reading_shows_it(seen):
    reading = seen.reading()
    assert Reading.from_json(reading.to_json()).to_json() == reading.to_json() and reading.summary.endswith(".")
    plane, over, ratio, rows = reading.panels
    assert list(plane.series) == list(over.series) == list(ratio.series) == [f"layer {i}" for i in range(1, 6)]
    assert plane.series["layer 2"][0] == (
        pytest.approx(float(seen.of_input[30][:, 0, 1].mean())),
        pytest.approx(float(seen.of_label[30][:, 0, 1].mean())),
    )
    assert [row[0] for row in rows.rows] == [30, 10] and reading.setting["activation"] == "tanh"


def test_it_is_registered_and_tells_its_progress():
    assert techniques()["information_plane"] is FUNCTIONS["information_plane"]
    assert CLAIMS["information_plane"] is FittingThenCompression
    done = []
    information_plane(activation="relu", widths=(4,), epochs=2, runs=1, progress=done.append)
    assert done == sorted(done) and done[-1] == 1 and set(ACTIVATIONS) == {"tanh", "relu"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"activation": "gelu"}, "neither tanh nor relu"),
        ({"bins": (1,)}, "two bins"),
        ({"bins": ()}, "two bins"),
        ({"runs": 0}, "are the least"),
        ({"widths": ()}, "are the least"),
        ({"share": 1.0}, "4096 of 4096"),
        ({"share": 0.05}, "holds a batch of 256"),
    ],
)
def test_bad_input_is_a_sentence(given, sentence):
    with pytest.raises(FoveateError, match=sentence):
        information_plane(**given)


def test_the_claim_runs(monkeypatch):
    monkeypatch.setattr(FittingThenCompression, "sizes", {"epochs": 3, "runs": 2, "looks": 2})
    done = []
    finding = FittingThenCompression().run(Bench(None, None, None, done.append))
    assert len(finding.checks) == 7 and done[-1] == 1
    assert not finding.checks["compression survives ReLU"]
