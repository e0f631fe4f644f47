"""What a reading shows while it works: what it will cost, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import PreTrainedModel

from foveate.models.anatomy import anatomy
from foveate.probes.base import Data, Probe, counted
from foveate.probes.watch import Watcher

TRIED = 128
"""Tokens of the forward that says how fast this machine is."""


class Progress:
    """A bar in a terminal, with the time left; otherwise a line for each probe that is done.

    Args:
        probes: what will be measured, by name.
        model, data: on what.
        show: whether anything is said at all.
    """

    def __init__(self, probes: Mapping[str, Probe], model: PreTrainedModel, data: Data, show: bool):
        self._model, self._data, self._probes = model, data, probes
        self._console = Console(stderr=True, quiet=not show, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        hidden = not (show and self._console.is_terminal)
        self._bar = Bar(*columns, console=self._console, transient=True, disable=hidden)
        self._costs = costs(probes, model, data)
        self._task = self._bar.add_task("foveate: reading", total=max(1.0, sum(self._costs.values())))
        self._done = 0.0
        self._start = time.perf_counter()

    def say(self, words: str) -> None:
        self._console.print(f"foveate: {words}", markup=False, soft_wrap=True)

    def begin(self) -> None:
        """Say what it will cost, before it starts."""
        if self._probes and not self._console.quiet:
            total = sum(self._costs.values())
            pace = self._pace()
            self.say(
                f"{counted(len(self._probes), 'probe')}, about {total:,.0f} tokens through the model: "
                f"{_minutes(total / pace)} at the pace of a first forward."
            )

    def _pace(self) -> float:
        """Tokens a second, of one forward after one to warm up."""
        import torch

        count = min(TRIED, self._data.length, anatomy(self._model).max_positions)
        ids = self._data.ordinary(self._model)[:1].repeat(1, count).to(self._model.device)
        with torch.no_grad():
            for _ in range(2):
                start = time.perf_counter()
                self._model(ids, use_cache=False, logits_to_keep=1)
                if ids.is_cuda:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
        return ids.numel() / seconds

    def __enter__(self) -> Progress:
        self._bar.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def part(self, group: Mapping[str, Probe]) -> Callable[[float], None]:
        """What a group of probes calls with the fraction that is done."""
        cost = sum(self._costs[name] for name in group)
        words = next(iter(group)) if len(group) == 1 else f"{len(group)} probes that share passes"
        self._bar.update(self._task, description=f"foveate: reading, {words}")
        return lambda done: self._bar.update(self._task, completed=self._done + done * cost)

    def finished(self, group: Mapping[str, Probe]) -> None:
        self._done += sum(self._costs[name] for name in group)
        self._bar.update(self._task, completed=self._done)
        if not self._bar.live.is_started:
            self.say(f"{', '.join(group)}: done after {time.perf_counter() - self._start:.0f} s.")


def costs(probes: Mapping[str, Probe], model: PreTrainedModel, data: Data) -> dict[str, float]:
    """Tokens through the model for each probe; a pass that several share counts for the first of them.

    Example:
        >>> import foveate as fv
        >>> from foveate.probes.induction import Induction
        >>> model = fv.tiny("llama")
        >>> costs({"induction": Induction()}, model, Data.of(model, fv.tiny_tokenizer(), length=32, passages=2))
        {'induction': 64.0}
    """
    seen: set[str] = set()
    found = {}
    for name, probe in probes.items():
        if isinstance(probe, Watcher):
            new = {data.alias(stream) for stream in probe.streams} - seen
            found[name] = float(len(new) * data.passages * min(data.length, anatomy(model).max_positions))
            seen |= new
        else:
            found[name] = probe.cost(model, data)
    return found


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"
