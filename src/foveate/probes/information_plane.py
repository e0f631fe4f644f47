"""Information plane: how much each layer of a small network knows of its input and of the label, while it learns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, function
from foveate.probes.base import Lines, Panel, Reading, Rows
from foveate.tasks.base import Bench

BITS = 12
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True)
class InformationPlane:
    """What was seen while the networks learned. Layers are the hidden ones, first to last; runs differ in all draws.

    Attributes:
        epochs: when it was looked at.
        of_input: by number of bins, I(X;T) in bits: (run, epoch, layer), float64.
        of_label: the same for I(T;Y).
        gradient_mean, gradient_std: of the gradients of an epoch's batches, weight by weight, the norm of their mean
            and of their standard deviation, over the norm of the layer's weights: (run, epoch, layer), float64.
        errors: the fractions of training and of test patterns that are told wrongly: (run, epoch, 2), float64.
        setting: what was asked for.
    """

    epochs: list[int]
    of_input: dict[int, Tensor]
    of_label: dict[int, Tensor]
    gradient_mean: Tensor
    gradient_std: Tensor
    errors: Tensor
    setting: dict[str, Any]

    def compression(self, bins: int | None = None) -> Tensor:
        """By how many bits I(X;T) lies below its highest at the end: (run, layer)."""
        seen = self.of_input[bins or next(iter(self.of_input))]
        return seen.amax(1) - seen[:, -1]

    def ratio(self) -> Tensor:
        """The mean of the gradients over their standard deviation: above 1 drift, below 1 diffusion. As they are."""
        return self.gradient_mean / self.gradient_std.clamp(min=1e-12)

    def reading(self) -> Reading:
        """As a reading, with its pictures, as probes give it."""
        bins = next(iter(self.of_input))
        x, y, ratio = (t.mean(0) for t in (self.of_input[bins], self.of_label[bins], self.ratio()))
        layers = range(x.shape[1])
        less = {each: mean(self.compression(each).mean(1).tolist()) for each in self.of_input}
        test = mean(self.errors[:, -1, 1].tolist())

        def over_epochs(values: Tensor) -> dict[str, list[tuple[float, float]]]:
            return {
                f"layer {i + 1}": [(float(e), float(v)) for e, v in zip(self.epochs, values[:, i], strict=True)]
                for i in layers
            }

        plane = {
            f"layer {i + 1}": [(float(a), float(b)) for a, b in zip(x[:, i], y[:, i], strict=True)] for i in layers
        }
        panels: list[Panel] = [
            Lines("The information plane", "bits about the input", "bits about the label", plane),
            Lines("What layers know of the input", "epoch", "bits", over_epochs(x)),
            Lines("Drift or diffusion", "epoch", "mean gradient over its deviation", over_epochs(ratio)),
            Rows(
                "Bits that are lost again, by number of bins",
                ["bins", *(f"layer {i + 1}" for i in layers)],
                [[each, *(round(float(v), 2) for v in self.compression(each).mean(0))] for each in self.of_input],
            ),
        ]
        summary = (
            f"Counted in {bins} bins, the hidden layers end {less[bins].value:.1f} bits below the most that they knew "
            f"of the input, and the networks tell {test.value:.1%} of new patterns wrongly."
        )
        metrics = {f"bits about the input lost again, {each} bins": value for each, value in less.items()}
        return Reading(
            "information_plane",
            "Does a network forget its input while it learns?",
            summary,
            {**metrics, "test error": test},
            panels=panels,
            setting=self.setting,
        )


@function(
    "information_plane",
    role="probe",
    paper=Paper(
        "Opening the Black Box of Deep Neural Networks via Information", 2017, "https://arxiv.org/abs/1703.00810"
    ),
    claim="a network first fits the labels, and then spends most of its training on forgetting the input",
)
def information_plane(
    *,
    activation: str = "tanh",
    widths: Sequence[int] = (10, 7, 5, 4, 3),
    bins: Sequence[int] = (30,),
    epochs: int = 600,
    runs: int = 5,
    rate: float = 0.1,
    batch: int = 256,
    share: float = 0.8,
    looks: int = 40,
    seed: int = 0,
    progress: Callable[[float], None] = lambda done: None,
) -> InformationPlane:
    """Train small networks on 12-bit patterns, and see what their layers know of the input and of the label.

    All 4,096 patterns are equally likely, and the network is a fixed map, so what a layer tells of them is the entropy
    of its activations, sorted into bins. The networks and the estimator are the paper's, as Saxe et al. (2018) tell
    them: hidden layers of 10, 7, 5, 4 and 3 units, 30 equal bins from -1 to 1, SGD in batches of 256 on 80% of the
    patterns. With ReLU, bins reach from 0 to the highest activation of that layer and run in all of training, as in
    Saxe et al.

    Ours: the labels, made anew after the paper's description (see `patterns`); the learning rate, with which 600 epochs
    are enough; one output unit; and gradients over all batches of an epoch.

    Args:
        activation: "tanh" or "relu".
        widths: units of the hidden layers.
        bins: how many bins; each number is looked at on the same networks.
        epochs: passes over the training patterns.
        runs: networks, each with other weights and other training patterns.
        rate: learning rate of SGD.
        batch: patterns of a batch.
        share: the part of the patterns that is trained on.
        looks: about how often it is looked at, in steps that grow.
        seed: of all draws.
        progress: called with the fraction done.

    Raises:
        FoveateError: an activation that is not known; numbers that leave nothing to train or to count.

    Example:
        >>> seen = information_plane(epochs=2, runs=1)
        >>> seen.epochs, seen.of_input[30].shape
        ([0, 1, 2], torch.Size([1, 3, 5]))
    """
    if activation not in ACTIVATIONS:
        raise FoveateError(f"information_plane: activation={activation} is neither tanh nor relu.")
    if not widths or min(*widths, epochs, runs, batch, looks) < 1 or not bins or min(bins) < 2:
        raise FoveateError(
            "information_plane: one layer, unit, epoch, run, look and pattern a batch, and two bins, are the least."
        )
    trained = int(share * 2**BITS)
    if not batch <= trained < 2**BITS:
        raise FoveateError(
            f"information_plane: share={share} trains on {trained} of {2**BITS} patterns: give a share below 1 that "
            f"holds a batch of {batch}."
        )
    draw = torch.Generator().manual_seed(seed)
    x, y = patterns()
    rows = torch.stack([torch.randperm(2**BITS, generator=draw) for _ in range(runs)])
    train, test = rows[:, :trained], rows[:, trained:]
    net = _Networks(activation, [BITS, *widths, 1], runs, draw)
    when = sorted({0, *(round(epochs ** (i / looks)) for i in range(looks + 1))})
    shots: list[list[Tensor]] = []
    errors: list[Tensor] = []
    means: list[Tensor] = []
    stds: list[Tensor] = []
    for epoch in range(epochs + 1):
        orders = torch.stack([row[torch.randperm(trained, generator=draw)] for row in train])
        batches = orders[:, : trained // batch * batch].split(batch, dim=1)
        if epoch not in when:
            for at in batches:
                net.step(x[at], y[at], rate)
        else:
            shots.append(net.hidden(x))
            wrong = ((net.logits(x.expand(runs, -1, -1)) > 0) != y.bool()).double()
            errors.append(torch.stack([wrong.gather(1, part).mean(1) for part in (train, test)], -1))
            norms = torch.stack([w.detach().double().flatten(1).norm(dim=1) for w in net.weights[:-1]], -1)
            steps = [net.step(x[at], y[at], rate) for at in batches]
            for found, stat in ((means, torch.Tensor.mean), (stds, torch.Tensor.std)):
                by_layer = [stat(torch.stack(g).double(), 0) if len(g) > 1 else g[0].double() for g in zip(*steps)]  # noqa: B905
                found.append(torch.stack([g.flatten(1).norm(dim=1) for g in by_layer], -1) / norms)
        progress(0.8 * (epoch + 1) / (epochs + 1))
    of_input, of_label = _information(shots, activation, bins, y, lambda done: progress(0.8 + 0.2 * done))
    setting = {
        "activation": activation,
        "widths": list(widths),
        "bins": list(bins),
        "epochs": epochs,
        "runs": runs,
        "rate": rate,
        "batch": batch,
        "share": share,
        "seed": seed,
    }
    return InformationPlane(
        when, of_input, of_label, torch.stack(means, 1), torch.stack(stds, 1), torch.stack(errors, 1), setting
    )


def patterns() -> tuple[Tensor, Tensor]:
    """All patterns of 12 bits as -1 and 1, float32 (4096, 12), and their labels, float32 (4096,): half of them 1.

    The bits are points on a sphere, and the label says whether the power spectrum of the points that are on, summed
    over degrees 0 to 3, is above its median: whatever way the sphere is turned, the label is the same, as in the
    paper. Ours are the points, drawn once, and the weights: 0.4 for degree 0, and else 1. So the number of ones
    decides about as much as in the paper's own patterns: 8% of those with five ones are 1, 47% with six, 96% with
    seven.

    Example:
        >>> patterns()[1].mean()
        tensor(0.5000)
    """
    points = torch.randn(BITS, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points /= points.norm(dim=1, keepdim=True)
    cos = points @ points.T  # by the addition theorem, a degree's power is a sum over pairs of its Legendre polynomial
    kernel = 0.4 + cos + (3 * cos**2 - 1) / 2 + (5 * cos**3 - 3 * cos) / 2
    on = (torch.arange(2**BITS)[:, None] >> torch.arange(BITS)).bitwise_and(1).double()
    power = ((on @ kernel) * on).sum(1)
    return (2 * on - 1).float(), (power > power.median()).float()


class _Networks:
    """Several networks of one shape that are trained side by side."""

    def __init__(self, activation: str, widths: Sequence[int], runs: int, draw: torch.Generator):
        self.act, gain = ACTIVATIONS[activation], 2.0 if activation == "relu" else 1.0
        shapes = list(itertools.pairwise(widths))
        self.weights = [(gain / a) ** 0.5 * torch.randn(runs, a, b, generator=draw) for a, b in shapes]
        self.biases = [torch.zeros(runs, 1, b) for _, b in shapes]
        for each in (*self.weights, *self.biases):
            each.requires_grad_()

    def layers(self, x: Tensor) -> list[Tensor]:
        """Each layer's output, the last one's as logits: (run, pattern, unit)."""
        out = [x]
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            made = torch.baddbmm(b, out[-1], w)
            out.append(made if i == len(self.weights) - 1 else self.act(made))
        return out[1:]

    def logits(self, x: Tensor) -> Tensor:
        return self.layers(x)[-1][..., 0]

    @torch.no_grad()
    def hidden(self, x: Tensor) -> list[Tensor]:
        return self.layers(x.expand(len(self.weights[0]), -1, -1))[:-1]

    def step(self, x: Tensor, y: Tensor, rate: float) -> list[Tensor]:
        """One step of SGD; the gradients of the hidden layers' weights."""
        losses = binary_cross_entropy_with_logits(self.logits(x), y, reduction="none").mean(1)
        every = [*self.weights, *self.biases]
        gradients = torch.autograd.grad(losses.sum(), every)  # of each network its own
        with torch.no_grad():
            for each, gradient in zip(every, gradients, strict=True):
                each -= rate * gradient
        return list(gradients[: len(self.weights) - 1])


def _information(
    shots: list[list[Tensor]], activation: str, bins: Sequence[int], y: Tensor, progress: Callable[[float], None]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """I(X;T) and I(T;Y) by number of bins, (run, epoch, layer), of hidden activations at each epoch."""
    layers, runs = len(shots[0]), len(shots[0][0])
    shape = runs, len(shots), layers
    of_input, of_label = ({n: torch.zeros(shape, dtype=torch.float64) for n in bins} for _ in range(2))
    for done, (layer, run) in enumerate(itertools.product(range(layers), range(runs))):
        high = 1.0 if activation == "tanh" else max(float(shot[layer][run].max()) for shot in shots)
        for epoch, shot in enumerate(shots):
            for n in bins:
                cells = binned(shot[layer][run], n, -1.0 if activation == "tanh" else 0.0, high)
                of_input[n][run, epoch, layer] = entropy(cells)
                of_label[n][run, epoch, layer] = mutual(cells, y)
        progress((done + 1) / (layers * runs))
    return of_input, of_label


def binned(values: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Which cell of equal bins each row falls into: values (row, unit) in [low, high]; LongTensor (row,).

    Example:
        >>> binned(torch.tensor([[-1.0, 0.9], [-0.9, 1.0], [0.2, 0.9]]), 2, -1, 1)
        tensor([0, 0, 1])
    """
    width = (high - low) / bins or 1.0  # of a layer that is dead all along
    at = ((values - low) / width).long().clamp(0, bins - 1)
    cells = torch.zeros(len(values), dtype=torch.long)
    for unit in at.T:  # numbered anew after each unit, so that numbers stay small
        cells = torch.unique(cells * bins + unit, return_inverse=True)[1]
    return cells


def entropy(cells: Tensor) -> float:
    """The entropy of a sample in bits, each row as likely.

    Example:
        >>> entropy(torch.tensor([0, 0, 1, 2]))
        1.5
    """
    part = torch.unique(cells, return_counts=True)[1].double() / len(cells)
    return float(-(part * part.log2()).sum())


def mutual(cells: Tensor, labels: Tensor) -> float:
    """The mutual information of two samples in bits, H(T) - H(T|Y).

    Example:
        >>> mutual(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]))
        1.0
    """
    within = [cells[labels == label] for label in labels.unique()]
    return entropy(cells) - sum(len(part) / len(cells) * entropy(part) for part in within)


@claim("information_plane")
class FittingThenCompression(Claim):
    statement: ClassVar[str] = (
        "training has two phases: layers first learn of the label and the input, and then, in most of the epochs and "
        "from where the training error is small, lose what they know of the input, as gradients go from drift to "
        "diffusion (abstract)"
    )
    setting: ClassVar[str] = (
        "no model: 8 tanh networks of 10-7-5-4-3 units on 12-bit patterns, 600 epochs, 30 bins; the same with 15 and "
        "100 bins, and with ReLU, where Saxe et al. (2018) saw no compression; lost are half a bit or more, the mean "
        "over layers"
    )

    sizes: ClassVar[dict[str, Any]] = {"epochs": 600, "runs": 8}

    def run(self, bench: Bench) -> Finding:
        def told(turn: int) -> Callable[[float], None]:
            return lambda done: bench.progress((turn + done) / 2)

        tanh, relu = (
            information_plane(activation=name, bins=(30, 15, 100), progress=told(turn), **self.sizes)
            for turn, name in enumerate(ACTIVATIONS)
        )
        last = tanh.of_label[30][..., -1]
        whole = tanh.of_input[30].mean(-1)  # over layers
        peak = whole.argmax(1)
        at_peak = tanh.errors[:, :, 0].gather(1, peak[:, None])[:, 0]
        after = mean([1 - tanh.epochs[int(p)] / tanh.epochs[-1] for p in peak])
        grown, small = mean((last[:, -1] - last[:, 0]).tolist()), mean(at_peak.tolist())
        ratios = {
            when: mean(tanh.ratio()[:, at].log2().mean(1).exp2().tolist()) for when, at in (("first", 0), ("last", -1))
        }
        lost = {
            f"{name}, {bins} bins": mean(seen.compression(bins).mean(1).tolist())
            for name, seen in (("tanh", tanh), ("ReLU", relu))
            for bins in (30, 15, 100)
        }
        metrics: dict[str, Metric] = {
            **{f"bits about the input lost again, {name}": value for name, value in lost.items()},
            "bits about the label gained by the last hidden layer, tanh": grown,
            "part of the epochs after the most about the input, tanh": after,
            "training error where layers know most of the input, tanh": small,
            **{f"mean gradient over its deviation, {when} epoch, tanh": value for when, value in ratios.items()},
            **{
                f"test error, {name}": mean(seen.errors[:, -1, 1].tolist())
                for name, seen in (("tanh", tanh), ("ReLU", relu))
            },
        }
        checks = {
            "fitting: the last hidden layer learns of the label": grown.low > 0,
            "compression: layers lose what they knew of the input (tanh, 30 bins)": lost["tanh, 30 bins"].low > 0.5,
            "in most of the epochs": after.low > 0.5,
            "from where the training error is small (under 10%)": small.high < 0.1,
            "gradients go from drift (over 1) to diffusion (under 1)": ratios["first"].low > 1 > ratios["last"].high,
            "compression survives 15 and 100 bins": all(lost[f"tanh, {bins} bins"].low > 0.5 for bins in (15, 100)),
            "compression survives ReLU": lost["ReLU, 30 bins"].low > 0.5,
        }
        return Finding(metrics, checks)
