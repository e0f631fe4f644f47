"""The page, read as text and opened in a real browser."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.compare.report import write_report
from foveate.errors import FoveateError

HOSTILE = """</script><script>document.title='owned'</script><img src=x onerror="document.title='owned'">&"'"""
TASKS = {
    "perplexity": "perplexity:tokens=16384,window=2048",
    "passkey": "passkey:tokens=2048,cases=8",
    "speed": "speed:prompt=1024,new=64",
    "generate": "generate:new=60",
    "held": "held:tokens=256",
}
# recipe: perplexity, cache, passkeys of 8, decode speed-up, share of the heads that hold an old entry
RECIPES = {
    "full": (12.31, 1.0, 8, 1.0, 1.0),
    "window:keep=0.25": (684.0, 0.031, 2, 1.61, 0.0),
    "streaming:keep=0.25": (13.4, 0.031, 2, 1.58, 0.0),
    "h2o:keep=0.5": (12.36, 0.0625, 7, 1.41, 0.5),
    "h2o:keep=0.2": (12.92, 0.025, 5, 1.66, 0.2),
    "skip-layers:keep=0.85": (15.9, 0.85, 6, 1.17, 1.0),
    "drop-attention:keep=0.8+h2o:keep=0.5": (13.1, 0.05, 5, 1.74, 0.5),
}
PROSE = (
    "The with statement is used to wrap the execution of a block with methods defined by a context manager. This "
    "allows common try except finally usage patterns to be encapsulated for convenient reuse. The pass key is 48213 . "
    "Remember it .\n\nA context manager is an object that defines the runtime context to be established when executing "
    "a with statement. The context manager handles the entry into, and the exit from, the desired runtime context for "
    "the execution of the block of code. What is the pass key ?"
)


def made_up_cells(hostile: str = "") -> list[dict[str, Any]]:
    """A run as `foveate compare` leaves it: seven recipes, five tasks, one failed cell. `hostile` is put in all texts."""
    dice = random.Random(0)
    setting = {
        "dtype": "float32", "device": "cpu", "seed": 0, "text": "prose", "text_digest": "9c1f4be2", "foveate": "0.1.0",
        "torch": "2.13.0", "transformers": "5.23.0",
    }
    tokens = [piece if i == 0 else f" {piece}" for i, piece in enumerate(PROSE.split(" "))]
    cells = []
    for recipe, (perplexity, cache, answered, speedup, old) in RECIPES.items():
        cache_metrics = {"cache_bytes": _exact(cache * 377487360), "cache_fraction": _exact(cache)}
        x = list(range(512, 16385, 512))
        breaks = recipe.startswith("window")
        y = [dice.gauss(1, 0.06) * (12.5 if breaks and at <= 1024 else perplexity * 1.2 if breaks else perplexity)
             for at in x]
        cases = [
            {"prompt": f"… The pass key is {k}1357. {hostile}What is the pass key?", "expected": f"{k}1357",
             "answer": f"{k}1357" if 7 - k < answered else "the same as the one above" + hostile,
             "ok": 7 - k < answered, "depth": k / 7}
            for k in range(8)
        ]
        heads = [
            90 if i < 4 and not breaks or i >= len(tokens) - 20 else round(90 * old * (dice.random() < 0.7 or old == 1))
            if old in (0, 1) else min(90, int(90 * old * 2 * dice.random()))
            for i in range(len(tokens))
        ]
        text = " and then the block is left, whatever happened in it. " * 3 if not breaks else " the the the, , , the" * 9
        measured: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "perplexity": (
                {"perplexity": {"value": perplexity, "low": perplexity * 0.965, "high": perplexity * 1.04}} | cache_metrics,
                {"curve": {"x": x, "y": y, "x_name": "tokens read", "y_name": "perplexity"},
                 "blocks": {"nll": [128 * math.log(perplexity) * dice.gauss(1, 0.0003) for _ in x], "tokens": [128] * 32}},
            ),
            "passkey": (
                {"passkey": {"value": answered / 8, "low": max(0, answered / 8 - 0.3) if answered < 8 else 1.0,
                             "high": min(1, answered / 8 + 0.25)}} | cache_metrics,
                {"cases": cases},
            ),
            "speed": (
                {"decode_speedup": _about(speedup, 0.05), "prefill_speedup": _about(1.0 if old else 0.97, 0.04),
                 "decode_tokens_per_second": _about(14.2 * speedup, 0.06), "prefill_seconds": _about(3.1, 0.1),
                 "peak_memory_bytes": _exact(890e6 + cache * 1e8), "parameters": _exact(134515008)}
                | cache_metrics, {},
            ),
            "generate": (
                {"tokens": _exact(60), "distinct_2": _exact(0.8)},
                {"samples": [{"prompt": "Write a sentence about the with statement." + hostile, "text": text + hostile},
                             {"prompt": "Once upon a time", "text": text}]},
            ),
            "held": (
                {"held_fraction": _exact(sum(heads) / 90 / len(heads))},
                {"held": {"tokens": tokens + ([hostile] if hostile else []),
                          "heads": heads + ([7] if hostile else []), "of": 90}},
            ),
        }
        for name, (metrics, artifacts) in measured.items():
            cells.append({
                "id": f"{len(cells):08x}", "model": "smollm2-135m" + hostile, "recipe": recipe + hostile if hostile and
                recipe != "full" else recipe, "task": TASKS[name], "status": "ok", "seconds": 12.3, "setting": setting,
                "metrics": metrics, "artifacts": artifacts,
            })
    broken = next(c for c in cells if c["recipe"].startswith("drop-attention") and c["task"] == TASKS["passkey"])
    broken |= {"status": "failed", "metrics": {}, "artifacts": {}, "reason":
               "RuntimeError: out of memory while 2.1 GiB were asked for; 0.4 GiB were free." + hostile}
    return cells


def _exact(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}


def _about(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}
