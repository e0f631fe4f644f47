"""What claims share that heal: a bench on a model that was changed for good, and healed."""

from __future__ import annotations

from dataclasses import replace

from foveate.heal.base import heal
from foveate.methods import RecipeLike, changed
from foveate.tasks.base import Bench

ON_CPU, ON_GPU = 16_384, 1_000_000
"""Tokens that a model heals on in a claim."""


def recovered(bench: Bench, recipe: RecipeLike, way: str) -> Bench:
    """A bench like the given one, on a changed copy of its model that was healed on calibration text.

    Args:
        bench: with the original, which teaches.
        recipe: what changes it.
        way: how it heals, such as `"lora:rank=8,lr=1e-3"`; the number of tokens hangs on the device.
    """
    student, _ = changed(bench.model, recipe, tokenizer=bench.tokenizer)
    gpu = bench.model.device.type == "cuda"
    size = f"tokens={ON_GPU},batch=16,length=512" if gpu else f"tokens={ON_CPU},batch=4,length=256"
    heal(student, bench.model, f"{way}{',' if ':' in way else ':'}{size}", tokenizer=bench.tokenizer, progress=False)
    return replace(bench, model=student)
