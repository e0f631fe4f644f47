"""Where a stopped run goes on: safetensors for numbers, JSON for the rest, whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.errors import FoveateError
from foveate.models.source import reason
from foveate.train import processes

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class State:
    """Where a run is.

    Attributes:
        run: what the run is made of; another run's checkpoint is refused.
        step: steps done.
        seconds: the time that they took.
        losses: the loss of each step.
        judged: (step, figure) of each look at validation examples.
    """

    run: dict[str, str]
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    judged: list[list[float]] = field(default_factory=list)


def save(folder: Path, state: State, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, and then delete the one before. Every process calls it; the first one writes.

    Args:
        folder: the run's own; the checkpoint is a folder in it.
        state: goes into JSON.
        trained: what is trained, and buffers that change with it, by name.
        optimizer: Adam's, whose moments are kept.
    """
    place = folder / f"checkpoint-{state.step:08}"
    if place.exists():  # this very step is kept already: there is never a moment without a whole checkpoint
        return
    weights = {name: _plain(p.detach()) for name, p in trained.items()}
    moments = {
        f"{kind}.{name}": _plain(optimizer.state[p][kind])
        for name, p in trained.items()
        for kind in MOMENTS
        if p in optimizer.state  # not, before the first step, or without a gradient
    }
    if processes.is_main():
        temporary = folder / f".checkpoint.{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(weights, temporary / "weights.safetensors")
            save_file(moments, temporary / "moments.safetensors")
            (temporary / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
            for written in temporary.iterdir():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
            temporary.rename(place)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise unwritten(folder, error) from error
        for other in _checkpoints(folder)[:-1]:
            shutil.rmtree(other, ignore_errors=True)
    processes.wait()


def unwritten(folder: Path, error: Exception) -> FoveateError:
    """What to say where a folder can't be written: safetensors has words of its own for a full disk."""
    return FoveateError(f"{folder} can't be written ({reason(error)}): make room there, or give another folder.")


def restore(folder: Path, state: State, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> State:
    """Set weights and moments to what the latest checkpoint in a folder says; the given state where there is none.

    Raises:
        FoveateError: the checkpoint is another run's, or can't be read.
    """
    if not (there := _checkpoints(folder)):
        return state
    place = there[-1]
    try:
        found = State(**json.loads((place / "state.json").read_text(encoding="utf-8")))
        if found.run != state.run:
            other = ", ".join(
                f"{k} {found.run.get(k)} instead of {v}" for k, v in state.run.items() if v != found.run.get(k)
            )
            raise FoveateError(
                f"{folder} holds a checkpoint of another run ({other}): give another folder to work in, or delete it."
            )
        weights = load_file(place / "weights.safetensors")
        moments = load_file(place / "moments.safetensors")
        for name, p in trained.items():
            if name not in weights or weights[name].shape != p.shape:
                raise FoveateError(
                    f"{place} is of a model of another shape ({name} is not {tuple(p.shape)} there): give another "
                    "folder to work in, or delete it."
                )
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(processes.like(weights[name], p))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, FoveateError):
            raise
        raise FoveateError(
            f"the checkpoint {place} can't be read ({error}): delete it, and the run begins anew."
        ) from error
    numbers = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    known = {
        numbers[p]: {kind: processes.like(moments[f"{kind}.{name}"], p) for kind in MOMENTS}
        | {"step": torch.tensor(float(found.step))}
        for name, p in trained.items()
        if f"{MOMENTS[0]}.{name}" in moments
    }
    optimizer.load_state_dict({"state": known, "param_groups": optimizer.state_dict()["param_groups"]})
    return found


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


def _plain(tensor: Tensor) -> Tensor:
    full = processes.whole(tensor).detach()
    return full.contiguous().cpu() if processes.is_main() else full
