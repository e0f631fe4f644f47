"""From what was seen to what to do: commands that spend the scores just measured."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foveate.methods import UnitScores

if TYPE_CHECKING:
    from foveate.read import Readings

LEAST = 0.1
"""The part of the sublayers that is called least needed."""


@dataclass(frozen=True)
class Advice:
    """One thing to try.

    Attributes:
        goes: True: something could go; False: something must stay.
        title: in a few words.
        words: what was seen.
        command: a command line that acts on it.
    """

    goes: bool
    title: str
    words: str
    command: str


def advice(readings: Readings) -> list[Advice]:
    """What the readings suggest to try; nothing is promised: the commands measure it."""
    place = str(readings.folder or "READING")
    model = shlex.quote(readings.asked)
    found: list[Advice] = []

    def scores(probe: str, name: str) -> UnitScores | None:
        reading = readings.readings.get(probe)
        return None if reading is None else reading.scores.get(name)

    for name, word in (("attention", "Attention"), ("mlp", "MLPs")):
        change = scores("layers", name)
        if change is None:
            continue
        values = change.scores[:, 0]
        count = max(1, round(LEAST * int((~values.isnan()).sum())))
        lowest = sorted(values.nan_to_num(float("inf")).argsort()[:count].tolist())
        recipe = f"scored:keep={1 - LEAST:g},file={place},of=layers.{name}"
        listed = ", ".join(map(str, lowest))
        found.append(
            Advice(
                True,
                f"{word} that hardly change what they get"
                if name == "mlp"
                else f"{word} that hardly changes what it gets",
                f"Least is changed in layers {listed}. That is no proof that they can go: this measures what goes "
                "wrong without them.",
                f"foveate compare {model} --recipes {shlex.quote('full,' + recipe)}",
            )
        )
        if name == "attention":
            found.append(
                Advice(
                    True,
                    "The same for good",
                    "The smaller model, with its figures before and after. It opens anywhere; healing takes much of "
                    "the loss back.",
                    f"foveate thin {model} {shlex.quote(recipe)} --heal lora:tokens=200k --out small/",
                )
            )
    if (retrieval := scores("retrieval-heads", "retrieval")) is not None:
        best = float(retrieval.scores.nan_to_num(0).max())
        budget = f"budget=measured(file={place},of=retrieval-heads.retrieval)"
        recipes = f"full,streaming:keep=0.5,streaming:keep=0.5,{budget}"
        found.append(
            Advice(
                False,
                "The far past, for heads that look there",
                f"Few heads fetch words from far back (the highest score is {best:.0%}). They need every entry of the "
                "cache; the rest can do with the first tokens and the last.",
                f"foveate compare {model} --recipes {shlex.quote(recipes)} --tasks perplexity,passkey",
            )
        )
    sinks = readings.readings.get("sinks")
    if sinks is not None and sinks.roles:
        found.append(
            Advice(
                False,
                "The first tokens",
                f"{len({(r.layer, r.unit) for r in sinks.roles})} heads rest on the first token. A cache that drops it "
                "breaks them: compare a window with and without the first four.",
                f"foveate compare {model} --recipes full,window:keep=0.25,streaming:keep=0.25 --tasks perplexity",
            )
        )
    return found
