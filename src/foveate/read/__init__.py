"""`foveate read`: what a model's heads, layers and tokens do, as data and as a page."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text as Shown
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.compare.grid import setting_of
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.methods import UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.load import load, model_name, tokenizer_for
from foveate.models.stored import kin
from foveate.probes.base import PROBES, Data, Probe, Reading, Role, counted, quiet
from foveate.probes.watch import Watcher, require_plain_heads, watch_all
from foveate.read.passage import PASSAGE, Attended, attended, passage_ids
from foveate.read.shown import Progress
from foveate.scores.file import FORMAT, damaged, read_file
from foveate.specs import nearest

__all__ = ["Readings", "read"]

LENGTH = 512
"""Tokens of a passage of text, where nothing else is asked for and the model has as many positions."""


@dataclass(frozen=True)
class Readings:
    """What probes found in a model: `readings["sinks"]` is one probe's `Reading`.

    Attributes:
        model: its name; asked: what it was asked for as; layers, heads, kv_heads: its sizes.
        kin: tells the model's family of cuts from others (`foveate.models.stored.kin`).
        readings: by the probe's name, in the order in which they were asked for.
        skipped: why a probe that nobody asked for by name could not be measured.
        setting: all else that determined them.
        passage: attention of every head over a passage, for the page; None: the page shows none.
        folder: where they lie, or None.
    """

    model: str
    asked: str
    layers: int
    heads: int
    kv_heads: int
    kin: str
    readings: dict[str, Reading]
    skipped: dict[str, str] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    passage: Attended | None = field(default=None, repr=False)
    folder: Path | None = None

    def __getitem__(self, probe: str) -> Reading:
        if probe not in self.readings:
            raise FoveateError(f"this reading has no probe {probe!r}: {nearest(probe, self.readings)}")
        return self.readings[probe]

    def __iter__(self) -> Iterator[str]:
        return iter(self.readings)

    def __len__(self) -> int:
        return len(self.readings)

    def scores(self, name: str) -> UnitScores:
        """Scores by `probe.score`, such as `"layers.attention"`."""
        probe, _, score = name.partition(".")
        known = self[probe].scores
        if not score and len(known) == 1:
            return next(iter(known.values()))
        if score not in known:
            raise FoveateError(f"the probe {probe} has no scores called {score!r}: {nearest(score, known)}")
        return known[score]

    @property
    def roles(self) -> list[Role]:
        """What single units do, of all probes."""
        return [role for reading in self.readings.values() for role in reading.roles]

    def summary(self) -> str:
        """One sentence: how many heads do what."""
        counts: dict[str, set[tuple[int, int]]] = {}
        for role in self.roles:
            if role.kind == "head":
                counts.setdefault(role.role, set()).add((role.layer, role.unit))
        if not counts:
            return f"No part is clear in any of the {self.layers * self.heads} heads."
        said = [f"{role} ({len(heads)})" for role, heads in sorted(counts.items(), key=lambda item: -len(item[1]))]
        some = len(set().union(*counts.values()))
        return f"{some} of {counted(self.layers * self.heads, 'head')} have a clear part: {', '.join(said)}."

    def table(self) -> Table:
        """What each probe found, for a terminal."""
        shown = Table(box=SIMPLE_HEAD)
        shown.add_column("probe", no_wrap=True)
        shown.add_column("found")
        for name, reading in self.readings.items():
            shown.add_row(name, Shown(reading.summary))
        for name, reason in self.skipped.items():
            shown.add_row(name, Shown(f"not measured: {reason}", "dim"))
        return shown

    def to_frame(self) -> Any:
        """All scores as a pandas DataFrame, with the column `probe` before those of `Reading.to_frame`."""
        frames = []
        for name, reading in self.readings.items():
            frame = reading.to_frame()
            frame.insert(0, "probe", name)
            frames.append(frame)
        if not frames:
            return Reading("", "", "").to_frame()
        import pandas  # the first frame found it

        return pandas.concat(frames, ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """As plain dictionaries and lists: what `reading.json` holds."""
        return {
            "format": FORMAT,
            "model": self.model,
            "asked": self.asked,
            "layers": self.layers,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "kin": self.kin,
            "setting": self.setting,
            "readings": {name: reading.to_json() for name, reading in self.readings.items()},
            "skipped": self.skipped,
        }

    @classmethod
    def load(cls, path: str | Path) -> Readings:
        """What lies in a folder, or in a `reading.json`; without the passage, which only the page has.

        Raises:
            FoveateError: there is no reading, or it is damaged.
        """
        given = read_file(path)
        folder = Path(path).expanduser()
        names = ("model", "asked", "layers", "heads", "kv_heads", "kin", "skipped", "setting")
        try:
            return cls(
                **{name: given[name] for name in names},
                readings={name: Reading.from_json(reading) for name, reading in given["readings"].items()},
                folder=folder if folder.is_dir() else folder.parent,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(path) from error

    def report(self, path: str | Path) -> Path:
        """Write the page, one HTML file that opens offline, and say where."""
        from foveate.read.report import write_anatomy

        return write_anatomy(self, Path(path))

    def _repr_html_(self) -> str:
        return "".join(reading._repr_html_() for reading in self.readings.values())


def read(
    model: PreTrainedModel | str | Path,
    probes: Iterable[str | Probe] | None = None,
    *,
    out: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str = "prose",
    passage: str | None = None,
    length: int | None = None,
    passages: int = 4,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    show: bool = True,
) -> Readings:
    """Measure what a model's heads, layers and tokens do. Probes that watch the same text share one forward.

    Args:
        model: what `foveate.load` takes, or a live model; it is afterwards as it was.
        probes: names, with fields as in `"sinks:alpha=4"`, or `Probe` objects; by default those that are quick and
            tell of any model (`foveate catalog --role probe` has all).
        out: a folder for `reading.json`, written after every probe (after all that share passes, together), and
            `anatomy.html`. A reading that was stopped goes on there. Without it nothing is written.
        tokenizer: of a live model that `foveate.load` didn't load.
        text: the reader's text: `prose`, `code`, a file, or `hub:NAME`; its calibration part is read.
        passage: a text over which the page shows each head's attention, up to its first 96 tokens or so; by default a
            short one that is always there.
        length, passages: tokens of a passage (512, or as many as the model has positions), and how many of each kind of
            text.
        seed: decides what is drawn at random.
        dtype, device: as for `foveate.load`.
        show: tell on the standard error what it costs and how far it is.

    Raises:
        FoveateError: a probe that is not there, or that can't be measured on this model and text; nothing has been
            measured or written then. A probe that nobody asked for by name is left out instead, with the reason.

    Example:
        >>> import foveate as fv
        >>> readings = fv.read(fv.planted(), ["induction"], tokenizer=fv.tiny_tokenizer(), length=64, show=False)
        >>> readings["induction"].of_role("induction")
        [(1, 3)]
        >>> readings.scores("induction.previous").kind
        'head'
    """
    chosen = chosen_probes(probes)
    words = load_text(text)
    live, words_tokenizer = (
        (model, tokenizer or tokenizer_for(model))
        if isinstance(model, PreTrainedModel)
        else load(model, dtype=dtype, device=device)
    )
    parts = anatomy(live)
    longest = parts.max_positions
    if length is not None and length > longest:
        raise FoveateError(
            f"passages of {length} tokens were asked for, and this model has {longest} positions: give a length of at "
            f"most {longest}."
        )
    length = min(LENGTH, longest) if length is None else length
    data = Data(words_tokenizer, words, length=length, passages=passages, seed=seed)
    skipped: dict[str, str] = {}
    for each, probe in list(chosen.items()):
        try:
            probe.check(live, data)
            for stream in probe.streams if isinstance(probe, Watcher) else ():
                data.stream(stream, live)
        except FoveateError as error:
            if probes is not None:
                raise
            skipped[each] = str(error)
            del chosen[each]
    shown_ids: Tensor | None = passage_ids(passage if passage is not None else PASSAGE, words_tokenizer, parts)
    try:
        require_plain_heads(live)
    except FoveateError as error:  # the page can do without
        skipped["passage"], shown_ids = str(error), None
    setting = setting_of(live, words, seed) | {"length": length, "passages": passages}
    name = model_name(live)
    asked = name if isinstance(model, PreTrainedModel) else str(model)
    readings = Readings(name, asked, len(parts.layers), parts.heads, parts.kv_heads, kin(live), {}, skipped, setting)
    with quiet(live), _folder(None if out is None else Path(out), readings) as (place, before):
        fields = {name: _fields(probe) for name, probe in chosen.items()}
        done = {n: r for n, r in before.items() if n in chosen and r.setting.get("fields", {}) == fields[n]}
        missing = {name: probe for name, probe in chosen.items() if name not in done}
        progress = Progress(missing, live, data, show)
        if done:
            progress.say(f"{len(done)} of {len(chosen)} probes are measured already.")
        progress.begin()
        with progress:
            for group in _groups(missing):
                start = time.perf_counter()
                data.progress = progress.part(group)
                if isinstance(next(iter(group.values())), Watcher):
                    found = watch_all(live, data, list(group.values()))  # type: ignore[arg-type]
                else:
                    found = [probe.measure(live, data) for probe in group.values()]
                for name, reading in zip(group, found, strict=True):
                    said = reading.setting | ({"fields": fields[name]} if fields[name] else {})
                    done[name] = replace(reading, setting=said, seconds=time.perf_counter() - start)
                progress.finished(group)
                if place is not None:
                    kept = {**{n: r for n, r in before.items() if n not in done}, **done}
                    _put(place / "reading.json", replace(readings, readings=kept))
        kept = {**{n: r for n, r in before.items() if n not in chosen}, **{n: done[n] for n in chosen}}
        seen = None if shown_ids is None else attended(live, shown_ids, words_tokenizer, parts)
        result = replace(readings, readings=kept, folder=place, passage=seen)
        if place is not None:
            _put(place / "reading.json", result)
            result.report(place / "anatomy.html")
    return result


def chosen_probes(probes: Iterable[str | Probe] | None) -> dict[str, Probe]:
    """Probes by name: those that are asked for, or those of every reading.

    Raises:
        FoveateError: there is no such probe, or one is asked for twice.

    Example:
        >>> list(chosen_probes(["induction"]))
        ['induction']
    """
    if probes is None:
        return {name: cls() for name, cls in PROBES.all().items() if cls.default}
    if isinstance(probes, str):
        probes = [probes]
    asked = [each if isinstance(each, Probe) else PROBES.parse(each) for each in probes]
    if not asked:
        raise FoveateError("no probe was asked for: name one, or leave probes out.")
    names = [each.name for each in asked]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FoveateError(f"the probe {twice} was asked for twice: give each once.")
    return dict(zip(names, asked, strict=True))


def default_out(model: str) -> Path:
    """Where a reading is kept that was given no place.

    Example:
        >>> default_out("smollm2-135m").as_posix()
        'runs/smollm2-135m-read'
    """
    return Path("runs", f"{Path(model).resolve().name}-read")


def _groups(probes: Mapping[str, Probe]) -> list[dict[str, Probe]]:
    """Watchers together, since they share passes; the others one by one, the cheapest first as they stand."""
    watchers: dict[str, Probe] = {name: probe for name, probe in probes.items() if isinstance(probe, Watcher)}
    others = [{name: probe} for name, probe in probes.items() if name not in watchers]
    return ([watchers] if watchers else []) + others


def _fields(probe: Probe) -> dict[str, Any]:
    """The settings of a probe that are not its defaults, as text."""
    words = probe.to_text().partition(":")[2]
    return {"given": words} if words else {}


# ---- the folder -----------------------------------------------------------------------------------------------------


@contextmanager
def _folder(place: Path | None, readings: Readings) -> Iterator[tuple[Path | None, dict[str, Reading]]]:
    """The folder, for this process alone, and what was read there before under the same setting."""
    if place is None:
        yield None, {}
        return
    there = next(each for each in (place, *place.absolute().parents) if each.exists())
    if not there.is_dir():
        raise FoveateError(f"{place} can't be a reading's folder, as {there} is a file: give another --out.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FoveateError(f"{there} can't be written to: give another --out.")
    ours = {"reading.json", "anatomy.html"}
    if there == place and any(e.name not in ours and not e.name.startswith(".") for e in place.iterdir()):
        raise FoveateError(f"{place} is not empty and holds no reading alone: give another --out.")
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / ".foveate-lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FoveateError(
            f"{place} is in use by another foveate process: wait for it, or give another --out."
        ) from error
    try:
        before: dict[str, Reading] = {}
        if (place / "reading.json").exists():
            made = Readings.load(place)
            changed = [key for key in readings.setting if made.setting.get(key) != readings.setting[key]]
            if made.kin != readings.kin or changed:
                raise FoveateError(
                    f"{place} holds a reading of {made.model} under another setting "
                    f"({', '.join(changed) or 'other weights'}): give another --out."
                )
            before = made.readings
        yield place, before
    finally:
        lock.release()
        (place / ".foveate-lock").unlink(missing_ok=True)


def _put(path: Path, readings: Readings) -> None:
    """Write `reading.json` whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(readings.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise FoveateError(f"{path} can't be written: {error.strerror}. Give another --out.") from error
