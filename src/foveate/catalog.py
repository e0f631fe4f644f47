"""The catalog: what techniques are here, from which papers, what they claim, and whether that was verified.

It is made from the methods themselves and from what `foveate verify` wrote, one file a claim.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from foveate.claims import CLAIMS
from foveate.errors import FoveateError
from foveate.methods import Function, Method, Paper, Part, techniques
from foveate.specs import nearest

CLAIMS_FOLDERS = (
    Path("docs", "claims"),  # where `foveate verify` writes by default
    Path(__file__).with_name("found"),  # what came with the installed package
    Path(__file__).parents[2] / "docs" / "claims",  # the same in a source tree
)
"""Folders that may hold what `foveate verify` found; the first that is there counts."""


@dataclass(frozen=True)
class Entry:
    """One technique.

    Attributes:
        name, role, claim: as the method says.
        kind: "method", named in recipes; "function", called as `foveate.<name>`; of a part what takes it, "budget",
            "code", "heal" or "probe".
        fields: hyper-parameters and their defaults, as text; None: must be given.
        paper: None for common knowledge.
        verified: "holds", "fails", "needs device", "not yet" (there is an experiment that was not run), or
            "no experiment".
        where: the file with the experiment's figures, or None.
    """

    name: str
    role: str
    claim: str
    kind: str
    fields: dict[str, str | None]
    paper: Paper | None
    verified: str
    where: str | None


def catalog(role: str | None = None, claims: Path | None = None) -> list[Entry]:
    """All techniques, or those of a role, by role and name.

    Args:
        role: "cache", "depth", "prune", ...
        claims: the folder that `foveate verify` wrote; None: the first of `CLAIMS_FOLDERS` that is there.

    Raises:
        FoveateError: there is no such role.

    Example:
        >>> [entry.role for entry in catalog() if entry.name == "h2o"]
        ['cache']
    """
    known = techniques()
    roles = {each.role for each in known.values()}
    if role is not None and role not in roles:
        raise FoveateError(f"there is no role called {role!r}: {nearest(role, roles)}")
    claims = claims or next((folder for folder in CLAIMS_FOLDERS if folder.is_dir()), CLAIMS_FOLDERS[0])
    entries = [_entry(each, claims) for each in known.values() if role in (None, each.role)]
    return sorted(entries, key=lambda entry: (entry.role, entry.name))


def _entry(cls: type[Method] | type[Part] | Function, claims: Path) -> Entry:
    fields: dict[str, str | None]
    if isinstance(cls, Function):
        keywords = [p for p in inspect.signature(cls.call).parameters.values() if p.kind is p.KEYWORD_ONLY]
        kind, fields = "function", {p.name: str(p.default) for p in keywords}
    else:
        missing = dataclasses.MISSING
        kind = cls.field if issubclass(cls, Part) else "method"
        fields = {f.name: None if f.default is missing else str(f.default) for f in dataclasses.fields(cls)}
    verified, where = "not yet" if cls.name in CLAIMS else "no experiment", None
    result = claims / f"{cls.name}.json"
    if result.exists():
        try:
            verified, where = json.loads(result.read_text(encoding="utf-8"))["status"], result.as_posix()
        except (OSError, ValueError, KeyError) as error:
            raise FoveateError(f"{result} holds no claim's result: run `foveate verify {cls.name}` again.") from error
    return Entry(cls.name, cls.role, cls.claim, kind, fields, cls.paper, verified, where)


def _called(entry: Entry) -> str:
    """The name as one writes it: in a recipe, or as a call."""
    if entry.kind == "function":
        return f"fv.{entry.name}()"
    return entry.name if entry.kind in ("method", "probe") else f"{entry.kind}={entry.name}"


def to_json(role: str | None = None, claims: Path | None = None) -> list[dict[str, Any]]:
    """The catalog as plain dictionaries.

    Example:
        >>> sorted(to_json()[0])
        ['claim', 'fields', 'kind', 'name', 'paper', 'role', 'verified', 'where']
    """
    return [dataclasses.asdict(entry) for entry in catalog(role, claims)]


def table(role: str | None = None, claims: Path | None = None) -> Table:
    """The catalog for a terminal.

    Example:
        >>> table("cache").columns[0].header
        'method'
    """
    shown = Table(box=SIMPLE_HEAD)
    shown.add_column("method", no_wrap=True)
    shown.add_column("claim, paper")
    shown.add_column("verified", no_wrap=True)
    entries = catalog(role, claims)
    for room in dict.fromkeys(entry.role for entry in entries):
        shown.add_row(Text(room, style="bold"))
        for entry in (each for each in entries if each.role == room):
            shown.add_row(f"  {_called(entry)}", Text(entry.claim), entry.verified)
            if (paper := entry.paper) is not None:
                shown.add_row("", Text(f"{paper.title}, {paper.year}", f"dim link {paper.url}"))
        shown.add_section()
    return shown


def markdown(claims: Path | None = None) -> str:
    """The catalog as a page of the documentation: a table for each role.

    Example:
        >>> markdown().splitlines()[0]
        '# Catalog'
    """
    entries = catalog(claims=claims)
    lines = ["# Catalog", "", "Made from the methods themselves: `foveate catalog` prints the same."]
    for role in dict.fromkeys(entry.role for entry in entries):
        lines += ["", f"## {role}", "", "| method | fields | claim | paper | verified |", "|---" * 5 + "|"]
        for entry in (each for each in entries if each.role == role):
            fields = ", ".join(f"`{k}`" if v is None else f"`{k}={v}`" for k, v in entry.fields.items())
            paper = f"[{entry.paper.title}]({entry.paper.url}), {entry.paper.year}" if entry.paper else "-"
            cells = (f"`{_called(entry)}`", fields or "-", entry.claim, paper, entry.verified)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
