"""Specs: things named in text as `name:field=value,...` - methods and tasks - and the registries that know them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from foveate.errors import FoveateError

S = TypeVar("S", bound="Spec")
C = TypeVar("C", bound=type)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A frozen dataclass that has a short name and a text form, `name:field=value,...`.

    Fields may be `int`, `float`, `bool`, `str`, a spec that has a registry of its own, or one of these or None. The
    text form leaves out fields that are at their defaults, so that equal specs have equal texts. A spec within a spec
    has its fields in brackets: `h2o:keep=0.2,budget=pyramid(slope=4)`.
    """

    name: ClassVar[str]
    registry: ClassVar[Any] = None
    """The `Registry` that knows this sort of spec, where other specs have fields of it."""
    positional: ClassVar[str | None] = None
    """The field that takes a value written without `field=`, as in `lm-eval:hellaswag`."""

    def to_text(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = [
            str(given[f.name]) if f.name == self.positional else f"{f.name}={value_text(given[f.name])}"
            for f in dataclasses.fields(self)
            if given[f.name] != f.default
        ]
        return self.name + (":" + ",".join(parts) if parts else "")

    def __str__(self) -> str:
        return self.to_text()


def value_text(value: Any) -> str:
    """A field's value as it stands in a spec's text."""
    if isinstance(value, Spec):
        name, colon, rest = value.to_text().partition(":")
        return f"{name}({rest})" if colon else name
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse_value(cls: type[Spec], key: str, text: Any) -> Any:
    """`text` as the type that the field `key` of `cls` is annotated with."""
    hint = typing.get_type_hints(cls)[key]
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if (text is None or str(text).lower() == "none") and type(None) in allowed:
        return None
    raw = str(text).strip()
    for kind in allowed:
        if isinstance(kind, type) and issubclass(kind, Spec):
            return text if isinstance(text, kind) else kind.registry.parse(_unbracketed(raw))
        if kind is bool and raw.lower() in ("true", "false"):
            return raw.lower() == "true"
        if kind in (int, float):
            try:
                value = kind(raw)
            except ValueError:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise FoveateError(f"{cls.name}: {key}={raw} is no number to work with: give a finite one.")
            return value
        if kind is str:
            return raw
    names = " or ".join(k.__name__ for k in allowed if k is not type(None))
    raise FoveateError(f"{cls.name}: {key}={raw} can't be read as {names}.")


def _unbracketed(text: str) -> str:
    """`name(field=value)` as `name:field=value`."""
    match = re.fullmatch(r"([^():]*)\((.*)\)", text)
    return f"{match[1]}:{match[2]}" if match else text


def split_outside(text: str, separator: str) -> list[str]:
    """Split at a separator (one character) wherever it stands outside of brackets.

    Raises:
        FoveateError: a bracket without its other half.

    Example:
        >>> split_outside("keep=0.2,budget=heads(whole=0.1,least=8)", ",")
        ['keep=0.2', 'budget=heads(whole=0.1,least=8)']
    """
    pieces, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    if depth:
        raise FoveateError(f"{text!r} has a bracket without its other half: write name(field=value).")
    return pieces


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the names nearest to `word`, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}."


class Registry(Generic[S]):
    """Short names to spec classes of one sort ("method", "task")."""

    def __init__(self, sort: str, load: Callable[[], None]):
        self.sort, self._load, self._classes = sort, load, dict[str, type[S]]()

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator: make the class a frozen, keyword-only dataclass known as `name`."""

        def decorate(cls: Any) -> Any:
            cls.name = name
            cls = dataclass(frozen=True, kw_only=True)(cls)
            if name in self._classes and self._classes[name].__qualname__ != cls.__qualname__:
                raise FoveateError(f"two {self.sort}s are both called {name!r}: rename one of them.")
            self._classes[name] = cls
            return cls

        return decorate

    def all(self) -> dict[str, type[S]]:
        """Every registered class by name, sorted."""
        self._load()
        return dict(sorted(self._classes.items()))

    def build(self, name: str, values: dict[str | None, Any]) -> S:
        """The object for a name and its field values (as text or already typed; key None: the positional one)."""
        known = self.all()
        if name not in known:
            raise FoveateError(f"there is no {self.sort} called {name!r}: {nearest(name, known)}")
        cls = known[name]
        fields = {f.name for f in dataclasses.fields(cls)}
        typed = {}
        for key, value in values.items():
            key = cls.positional if key is None else key
            if key is None:
                raise FoveateError(f"{name}:{value} lacks a field name: write {name}:field={value}.")
            if key not in fields:
                hint = nearest(key, fields) if fields else "it has none."
                raise FoveateError(f"the {self.sort} {name!r} has no field {key!r}: {hint}")
            typed[key] = _parse_value(cls, key, value)
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.name not in typed and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise FoveateError(f"the {self.sort} {name!r} needs {', '.join(missing)}: write {name}:{missing[0]}=...")
        return cls(**typed)

    def parse(self, text: str) -> S:
        """One `name:field=value,field=value`."""
        name, colon, rest = text.strip().partition(":")
        if colon and not rest.strip():
            raise FoveateError(f"{text!r} ends in a colon: write {name} alone, or {name}:field=value.")
        values: dict[str | None, Any] = {}
        for part in split_outside(rest, ",") if rest else ():
            key, equals, value = part.partition("=")
            slot = key.strip() if equals else None
            if slot in values:
                raise FoveateError(f"{text!r} gives {slot} twice: give it once.")
            values[slot] = value if equals else key
        return self.build(name.strip(), values)


def split_specs(text: str) -> list[str]:
    """Split `"full,h2o:keep=0.2,recent=0.3,window:keep=0.2"` at the commas that part specs, not fields.

    Example:
        >>> split_specs("full,h2o:keep=0.2,recent=0.3,window:keep=0.2")
        ['full', 'h2o:keep=0.2,recent=0.3', 'window:keep=0.2']
    """
    specs: list[str] = []
    for piece in split_outside(text, ","):
        if specs and re.match(r"\s*\w+\s*=", piece):
            specs[-1] += "," + piece.strip()
        elif piece.strip():
            specs.append(piece.strip())
    return specs
