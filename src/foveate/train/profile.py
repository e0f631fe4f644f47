"""What each layer of a backbone does: its gradient, the residual stream after it, the harm when it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.backbone import Backbone
from foveate.methods import UnitScores
from foveate.train.tasks import TRAIN_TASKS, Batch, TrainTask

COLUMNS = ("gradient", "variance", "largest", "damage")


@dataclass(frozen=True)
class DepthProfile:
    """A readout of each layer; tensors are float64 (layers,).

    Attributes:
        loss: of the whole model, without what modules add to it.
        gradient: the norm of the loss's gradient to the layer's weights; NaN where none of them learns.
        variance: of the residual stream after the layer, over channels; the mean over tokens.
        largest: the largest absolute value of the residual stream after the layer.
        damage: how much the loss rises when the layer alone is removed.
    """

    loss: float
    gradient: Tensor
    variance: Tensor
    largest: Tensor
    damage: Tensor

    def to_rows(self) -> list[dict[str, float]]:
        """A row for each layer, from 0: what `pandas.DataFrame` takes."""
        columns = self.to_dict()
        return [{name: values[i] for name, values in columns.items()} for i in range(len(self.gradient))]

    def to_dict(self) -> dict[str, list[float]]:
        """A column for each readout, and `layer`."""
        columns = {name: getattr(self, name).tolist() for name in COLUMNS}
        return {"layer": list(range(len(self.gradient))), **columns}

    def scores(self) -> dict[str, UnitScores]:
        """The readouts that say how much a layer matters: by its gradient, and by the damage when it is gone."""
        return {name: UnitScores("layer", getattr(self, name)[:, None].float()) for name in ("gradient", "damage")}

    def deep(self, name: str) -> float:
        """The mean of a readout over the second half of the layers."""
        values: Tensor = getattr(self, name)
        return float(values[len(values) // 2 :].mean())

    def spread(self, name: str) -> float:
        """How uneven a readout is over layers: its standard deviation over its mean; 0: the same in all."""
        values: Tensor = getattr(self, name)
        return float(values.std(correction=0) / values.mean())

    def growth(self, name: str) -> float:
        """A readout in the last layer over that in the first."""
        values: Tensor = getattr(self, name)
        return float(values[-1] / values[0])


def depth_profile(
    model: Backbone, data: Batch | TrainTask | str, *, count: int = 64, batch: int = 64, seed: int = 0
) -> DepthProfile:
    """Read each layer of a model out, as it is in eval mode; gradients that it has and its mode are left as they were.

    Args:
        data: examples, or a task (`"lm:length=128"`), of which validation examples are drawn.
        count: examples drawn.
        batch: examples that go through at once.
        seed: of the examples drawn.

    Example:
        >>> from foveate.train import Sizes, build
        >>> task = TRAIN_TASKS.parse("mqar:pairs=1,length=8,vocab=8")
        >>> profile = depth_profile(build(task, Sizes(width=32, layers=3)), task)
        >>> profile.to_dict()["layer"], bool((profile.gradient > 0).all())
        ([0, 1, 2], True)
        >>> profile.scores()["damage"].scores.shape
        torch.Size([3, 1])
    """
    task = TRAIN_TASKS.parse(data) if isinstance(data, str) else data
    if isinstance(task, TrainTask):
        task = task.batch(count, "validation", 0, model.device, seed=2_000_003 + seed)
    pieces = [Batch(*each) for each in zip(*(each.split(batch) for each in task), strict=True)]
    shares = [len(each.inputs) / len(task.inputs) for each in pieces]
    training = model.training
    model.eval()
    try:
        loss, gradient, variance, largest = _read(model, pieces, shares)
        without = []
        with torch.no_grad():
            for layer in model.layers:
                with _removed(layer):
                    without.append(sum(s * float(_loss(model, each)) for s, each in zip(shares, pieces, strict=True)))
    finally:
        model.train(training)
    return DepthProfile(loss, gradient, variance, largest, torch.tensor(without, dtype=torch.float64) - loss)


def _read(model: Backbone, pieces: list[Batch], shares: list[float]) -> tuple[float, Tensor, Tensor, Tensor]:
    """The loss; then, of each layer, the gradient's norm, the stream's variance and its largest value."""
    layers: list[nn.Module] = list(model.layers)
    weights = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
    flat = [p for each in weights for p in each]
    total, sums = 0.0, [torch.zeros_like(p) for p in flat]
    variances = torch.zeros(len(layers), dtype=torch.float64, device=model.device)
    largest = torch.zeros_like(variances)
    calls = torch.zeros_like(variances)  # an order may use a layer several times

    def watch(i: int) -> Any:
        def seen(module: nn.Module, given: Any, got: Any) -> None:
            x = got[0].detach().double()
            variances[i] += share * x.var(-1, correction=0).mean()
            calls[i] += share
            largest[i] = torch.maximum(largest[i], x.abs().max())

        return seen

    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(watch(i)).remove)
        for share, piece in zip(shares, pieces, strict=True):
            with torch.enable_grad():
                loss = _loss(model, piece)
                found = torch.autograd.grad(loss, flat, allow_unused=True) if flat else ()
            total += share * float(loss.detach())
            for held, each in zip(sums, found, strict=True):
                if each is not None:
                    held += share * each
    squares = iter([float(each.double().square().sum()) for each in sums])
    norms = [sum(next(squares) for _ in each) ** 0.5 if each else float("nan") for each in weights]
    return total, torch.tensor(norms, dtype=torch.float64), (variances / calls).cpu(), largest.cpu()


def _loss(model: Backbone, batch: Batch) -> Tensor:
    """The task's own loss: what modules add is no part of it."""
    given = {"input_ids" if model.embed is not None else "inputs_embeds": batch.inputs}
    loss: Tensor = model(**given, targets=batch.targets).loss
    return loss - model.extra_loss()


@contextmanager
def _removed(layer: nn.Module) -> Iterator[None]:
    """The layer gives back the stream that it was given."""
    handle = layer.register_forward_hook(lambda module, given, got: (given[0], *got[1:]))
    try:
        yield
    finally:
        handle.remove()
