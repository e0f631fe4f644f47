"""The run folder: what a run has finished so far, safe against being stopped at any moment.

    run.json         the arguments that the run was made with
    cells/<id>.json  one for each finished cell
    results.jsonl    one line a cell, in the grid's order
    report.html

Every file is written under a temporary name and then renamed, so that a file that is there is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from foveate.compare.grid import FORMAT, Cell
from foveate.errors import FoveateError
from foveate.version import __version__

OURS = ".foveate-"
"""How the names of the lock and of unfinished files begin."""


class RunFolder:
    """A run folder that this process alone writes to while the `with` block lasts.

    Finished cells (`ok`) stay as they are; failed ones and unreadable files count as missing and are run
    again.

    Args:
        path: the folder, made where it is missing.
        arguments: JSON-ready; all that the user asked for. A folder made by other arguments is refused.

    Raises:
        FoveateError: the folder holds something else, is of other arguments, in use, or can't be written.

    Example:
        >>> import tempfile
        >>> from foveate.compare.grid import Cell
        >>> cell = Cell("tiny", "full", "perplexity", {"seed": 0})
        >>> with RunFolder(Path(tempfile.mkdtemp()), {"seed": 0}) as folder:
        ...     folder.plan([cell])
        ...     folder.put(cell, {"status": "ok", "seconds": 1.0, "metrics": {}, "artifacts": {}})
        ...     folder.missing()
        []
    """

    def __init__(self, path: Path, arguments: Mapping[str, Any]):
        self.path, self.arguments = path, json.loads(json.dumps(arguments))
        self.cells: Sequence[Cell] = ()
        self._records: dict[str, dict[str, Any]] = {}
        self._lock = FileLock(path / f"{OURS}lock")
        self.check()

    def check(self) -> None:
        """Raise FoveateError unless the folder could be made, or is a run made by the same arguments."""
        there = next(each for each in (self.path, *self.path.absolute().parents) if each.exists())
        if not there.is_dir():
            raise FoveateError(f"{self.path} can't be a run's folder, as {there} is a file: give another --out.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise FoveateError(f"{there} can't be written to: give another --out.")
        if there != self.path:
            return
        if (self.path / "run.json").exists():
            self._check_arguments()
        elif any(not each.name.startswith(OURS) for each in self.path.iterdir()):
            raise FoveateError(f"{self.path} is not empty and no run folder: give another --out.")

    def _check_arguments(self) -> None:
        try:
            run = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            made, version = run["arguments"], run["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FoveateError(f"{self.path / 'run.json'} is damaged: give another --out.") from error
        if version != FORMAT:
            raise FoveateError(
                f"{self.path} has format {version}, but this foveate ({__version__}) writes format {FORMAT}: "
                "give another --out."
            )
        for key in {**made, **self.arguments}:
            if made.get(key) != self.arguments.get(key):
                raise FoveateError(
                    f"{self.path} was made with {key} {_listed(made.get(key))}, but this run asks for "
                    f"{_listed(self.arguments.get(key))}: give another --out, or the same arguments."
                )

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise FoveateError(
                f"{self.path} is in use by another foveate process: wait for it, or give another --out."
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self.check()  # once more, now that no other process can change it
            for leftover in [*self.path.glob(f"{OURS}*.tmp"), *self.path.glob(f"cells/{OURS}*.tmp")]:
                leftover.unlink(missing_ok=True)
            if not (self.path / "run.json").exists():
                run = {
                    "format": FORMAT,
                    "arguments": self.arguments,
                    "foveate": __version__,
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                }
                self._write("run.json", json.dumps(run, indent=2))
            (self.path / "cells").mkdir(exist_ok=True)
        except OSError as error:
            self._lock.release()
            raise self._unwritable(error) from error
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def plan(self, cells: Sequence[Cell]) -> None:
        """Say which cells the grid has; what is there of them is read."""
        self.cells = cells
        self._records = {cell.id: record for cell in cells if (record := self._read(cell)) is not None}
        self._write_results()

    def missing(self) -> list[Cell]:
        """The cells that are yet to be run: those that are not there, and those that failed."""
        return [cell for cell in self.cells if self._records.get(cell.id, {}).get("status") != "ok"]

    def records(self) -> list[dict[str, Any]]:
        """What is finished, failed cells included, in the grid's order: the contents of the cell files."""
        return [self._records[cell.id] for cell in self.cells if cell.id in self._records]

    def unused(self) -> int:
        """How many cells in the folder are no part of the grid: those of other versions, weights or texts."""
        return len({path.stem for path in self.path.glob("cells/*.json")} - {cell.id for cell in self.cells})

    def put(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Store what running a cell gave, as `foveate.compare.seat.run_cell` returns it."""
        record = {"id": cell.id, **cell.to_json(), **result}
        self._write(f"cells/{cell.id}.json", json.dumps(record, allow_nan=False))
        self._records[cell.id] = record
        self._write_results()

    def _read(self, cell: Cell) -> dict[str, Any] | None:
        try:
            record = json.loads((self.path / "cells" / f"{cell.id}.json").read_text(encoding="utf-8"))
            return record if record["id"] == cell.id and record["status"] in ("ok", "failed") else None
        except (OSError, ValueError, KeyError, TypeError):  # not there, or cut short
            return None

    def _write_results(self) -> None:
        columns = ("model", "recipe", "task", "metrics", "setting", "status", "seconds", "reason")
        lines = [{key: record[key] for key in columns if key in record} for record in self.records()]
        self._write("results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def _write(self, name: str, text: str) -> None:
        path = self.path / name
        unfinished = path.with_name(f"{OURS}{path.name}.tmp")
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> FoveateError:
        return FoveateError(
            f"the run folder {self.path} can't be written ({error.strerror}): free it, or give another --out."
        )


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
