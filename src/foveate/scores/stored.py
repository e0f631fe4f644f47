"""Scores that took long are kept on disk, under the model they are of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.models.source import cache_dir

SAMPLE = 256
"""Numbers of each parameter that tell models apart."""


def fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that change with the weights: of every parameter its name, shape, and some numbers.

    The numbers are rounded to bfloat16, so that a model has one fingerprint in any dtype.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def stored(model: PreTrainedModel, what: str, version: str, make: Callable[[], Tensor]) -> Tensor:
    """The scores called `what` of a model: from disk, or made and written there.

    Args:
        model: the model.
        what: a short name of the scores, for the file and for what is said while they are made.
        version: everything that determines them beside the model.
        make: makes them, float (layers, units).
    """
    key = hashlib.sha256(f"{fingerprint(model)} {what} {version}".encode()).hexdigest()[:16]
    path = cache_dir() / "scores" / f"{what}-{key}.json"
    if path.exists():
        return torch.tensor(json.loads(path.read_text(encoding="utf-8"))["scores"])
    scores = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"what": what, "version": version, "scores": scores.tolist()}), encoding="utf-8")
    os.replace(part, path)
    return scores
