"""The walk: greedy steps down to the goal, each measured, each measurement kept, so that a stopped walk goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.search.axes import Axis, cache_share
from foveate.search.goals import Goal
from foveate.search.loss import Loss
from foveate.search.states import Live, State, Step

TRIES = 4
"""Measurements at most, in one round, of steps that were measured on an earlier state."""


@dataclass(frozen=True)
class Taken:
    """A step that was taken.

    Attributes:
        axis, name: of the step.
        loss: nats a token on calibration text after it (KL divergence from the original).
        amount: what the goal counts, after it.
        measured: measurements made so far.
    """

    axis: str
    name: str
    loss: float
    amount: float
    measured: int


class Journal:
    """Every measured step, a line of JSON each, under the state that it leads to.

    Args:
        path: the file; None: nothing is kept.
        settings: all that determines a measurement; a file of another search is refused.

    Raises:
        FoveateError: the file is of another search, or can't be read.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path, self.known = path, dict[str, float]()
        if path is None:
            return
        whole = b""
        if path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]  # the last line may have been cut short
        lines = []
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            before = lines[0]["settings"] if lines else settings
            self.known = {line["state"]: line["loss"] for line in lines[1:] if "state" in line}
        except (ValueError, KeyError, TypeError) as error:
            raise FoveateError(f"{path} is damaged ({error}): remove it, or give another --out.") from error
        if before != settings:
            other = [name for name in settings if before.get(name) != settings[name]]
            raise FoveateError(
                f"{path} holds a search with another {', '.join(other) or 'version'}: give another --out, or the "
                "arguments of that search to go on with it."
            )
        if path.exists() and whole != path.read_bytes():
            path.write_bytes(whole)
        if not lines:
            self._add({"settings": settings})

    def add(self, step: Step, state: State, loss: float, amount: float) -> None:
        """Note what a step leads to."""
        self.known[state.digest] = loss
        self._add({"step": step.name, "state": state.digest, "loss": loss, "amount": amount})

    def _add(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


@dataclass
class _Known:
    """What is known of a step: how much loss it added when it was measured, and after which round that was."""

    rise: float
    amount: float
    loss: float
    after: int


def walk(
    live: Live,
    loss: Loss,
    goal: Goal,
    axes: Sequence[Axis],
    journal: Journal,
    progress: Callable[[list[Taken], int, int, int], None] = lambda taken, measured, left, steps: None,
) -> tuple[State, list[Taken]]:
    """From the original down to the goal; each round takes the step that adds the least loss for what it saves.

    Steps that were measured on an earlier state stand in line by what they added then. Only those at the head of the
    line are measured again, until one of them stays at the head, or `TRIES` have been: the lazy form of greedy search.
    Of the loss that a step adds, no more is paid for than is still to be saved, so the last step is a small one.

    Args:
        live: the model, in its original state; left in the state that was reached.
        progress: called after each measurement with the steps taken, the measurements made, those still missing in
            this round, and about how many rounds are to come.

    Raises:
        FoveateError: the axes have no steps left, and the goal is not reached.
    """
    state, taken = State(), list[Taken]()
    here, amount = 0.0, goal.amount(live.model)
    start = amount
    known: dict[str, _Known] = {}
    measured, remembered = 0, state
    floor = lowest(live, goal, axes)
    if floor > goal.target:
        raise FoveateError(
            f"{goal.name}: {goal.words(goal.target)} of {goal.axis} can't be reached: with all that the axes "
            f"{', '.join(axis.name for axis in axes)} let go, it is {goal.words(floor)}. Ask for less, or add axes."
        )

    def measure(step: Step, missing: int) -> None:
        nonlocal measured, remembered
        after = step.after(state)
        live.show(after)
        cost = goal.amount(live.model, cache_share(after.cache))
        value = journal.known.get(after.digest)
        if value is None and cost < amount:
            if remembered is not state and not after.cache:  # not before it is needed: a walk that goes on is quick
                live.show(state)
                loss.remember()
                remembered = state
                live.show(after)
            value = loss.of(step.first, after.cache)
            journal.add(step, after, value, cost)
        # What saves nothing is never taken, so its loss need not be known.
        known[step.name] = _Known(0.0 if value is None else value - here, cost, value or 0.0, len(taken))
        measured += 1
        saved = (start - amount) / len(taken) if taken else 0.0
        progress(taken, measured, missing, round((amount - goal.target) / saved) if saved else -1)

    def rate(name: str) -> float:
        saves = min(amount - known[name].amount, amount - goal.target)
        return known[name].rise / saves if saves > 0 else float("inf")

    while amount > goal.target:
        steps = {step.name: step for axis in axes for step in axis.steps(state)}
        new = [step for name, step in steps.items() if name not in known]
        for i, step in enumerate(new):
            measure(step, len(new) - 1 - i)
        for i in range(TRIES):
            best = min(steps, key=rate, default="")
            if not best or known[best].after == len(taken):
                break
            measure(steps[best], TRIES - 1 - i)
        tried = [name for name in steps if known[name].after == len(taken)]
        best = min(tried, key=rate, default="")
        if not best or rate(best) == float("inf"):
            raise FoveateError(f"no step saves any {goal.axis} at {goal.words(amount)}: ask for less, or add axes.")
        step, found = steps[best], known[best]
        state = step.after(state)
        for name, other in list(steps.items()):
            if other.places & step.places:  # what it saves, and what it adds, is another now
                known.pop(name, None)
        fallen = found.amount - amount
        for entry in known.values():  # elsewhere a step saves as much as before
            entry.amount += fallen
        here, amount = found.loss, found.amount
        taken.append(Taken(step.axis, step.name, here, amount, measured))
        live.show(state)
        progress(taken, measured, 0, -1)
    return state, taken


def lowest(live: Live, goal: Goal, axes: Sequence[Axis]) -> float:
    """The amount where every step has been taken that the axes have.

    A sublayer is cut or factorised, not both, so that what goes first decides: both orders are tried, after the axes
    that take whole sublayers.
    """
    whole = [axis for axis in axes if axis.name in ("attention", "mlp", "layer")]
    ranks = [axis for axis in axes if axis.name == "rank"]
    others = [axis for axis in axes if axis not in whole + ranks]
    floors = []
    for order in (whole + others + ranks, whole + ranks + others):
        state = State()
        for axis in order:
            while steps := axis.steps(state):
                state = steps[0].after(state)
        live.show(state)
        floors.append(goal.amount(live.model, cache_share(state.cache)))
    live.show(State())
    return min(floors)
