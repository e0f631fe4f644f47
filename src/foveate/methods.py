"""What every technique is made of: methods, recipes, unit scores, and the registry that finds them.

A **method** is one published technique: a frozen, keyword-only dataclass whose fields are its hyper-parameters.
A **recipe** is an ordered list of methods, as text (`"drop-attention:keep=0.8+h2o:keep=0.2"`), as YAML or as
objects; the three forms round-trip. `apply` puts a recipe in force on a live model and takes it off again.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import load_text, tokens
from foveate.errors import FoveateError
from foveate.models.load import tokenizer_for

S = TypeVar("S", bound="Spec")
C = TypeVar("C", bound=type)

ROOMS = ("cache", "depth", "prune")
"""The packages under `foveate` that hold techniques, a room for each role."""

# ---- specs: things named in text as `name:field=value,field=value` ----------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A frozen dataclass that has a short name and a text form, `name:field=value,...`.

    Fields may be `int`, `float`, `bool`, `str`, or one of these or None. The text form leaves out fields that are
    at their defaults, so that equal specs have equal texts.
    """

    name: ClassVar[str]
    positional: ClassVar[str | None] = None
    """The field that takes a value written without `field=`, as in `lm-eval:hellaswag`."""

    def to_text(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = [
            str(given[f.name]) if f.name == self.positional else f"{f.name}={_value_text(given[f.name])}"
            for f in dataclasses.fields(self)
            if given[f.name] != f.default
        ]
        return self.name + (":" + ",".join(parts) if parts else "")

    def __str__(self) -> str:
        return self.to_text()


def _value_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse_value(cls: type[Spec], key: str, text: Any) -> Any:
    """`text` as the type that the field `key` of `cls` is annotated with."""
    hint = typing.get_type_hints(cls)[key]
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if (text is None or str(text).lower() == "none") and type(None) in allowed:
        return None
    raw = str(text).strip()
    for kind in allowed:
        if kind is bool and raw.lower() in ("true", "false"):
            return raw.lower() == "true"
        if kind in (int, float):
            try:
                return kind(raw)
            except ValueError:
                continue
        if kind is str:
            return raw
    names = " or ".join(k.__name__ for k in allowed if k is not type(None))
    raise FoveateError(f"{cls.name}: {key}={raw} can't be read as {names}.")


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
        for part in rest.split(",") if rest else ():
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
    for piece in text.split(","):
        if specs and re.match(r"\s*\w+\s*=", piece):
            specs[-1] += "," + piece.strip()
        elif piece.strip():
            specs.append(piece.strip())
    return specs


# ---- methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paper:
    """Where a technique was published."""

    title: str
    year: int
    url: str


@dataclass
class Target:
    """What a method is applied to.

    Attributes:
        model: the live model.
        context: the number of tokens that a cache budget `keep` is a fraction of, where the caller states one (a
            streaming window, say); None: the prompt, as it comes.
        calibration: gives calibration token ids, LongTensor (1, length); called only by methods that need them.
    """

    model: PreTrainedModel
    context: int | None
    calibration: Callable[[], Tensor]


class Method(Spec, ABC):
    """One published technique. A role's base class says how it gets hold of a model; a technique says what it does.

    Class attributes: `name`, `role` (the room), `paper` (None for common knowledge), `claim` (one line: what it is
    said to do).
    """

    role: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    claim: ClassVar[str]

    @abstractmethod
    def applied(self, target: Target) -> AbstractContextManager[None]:
        """A context manager: in force inside, gone without a trace after."""


@functools.cache
def load_rooms() -> None:
    """Import every room and every plug-in (entry points of the group `foveate.methods`), so that all register."""
    for room in ROOMS:
        importlib.import_module(f"foveate.{room}")
    for entry in importlib.metadata.entry_points(group="foveate.methods"):
        entry.load()


METHODS: Registry[Method] = Registry("method", load_rooms)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def method(name: str) -> Callable[[C], C]:
    """Class decorator: register a technique under its short name, as a frozen keyword-only dataclass.

    Example:
        >>> from foveate.cache import CachePolicy
        >>> from foveate.methods import METHODS, method
        >>> @method("oldest-first")
        ... class OldestFirst(CachePolicy):
        ...     claim = "keeping the oldest entries is a poor idea"
        ...     def score(self, view):
        ...         return -view.positions.float()
        >>> str(OldestFirst(keep=0.5))
        'oldest-first:keep=0.5'
    """
    return METHODS.register(name)


# ---- recipes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """An ordered list of methods.

    Example:
        >>> from foveate.methods import Recipe
        >>> recipe = Recipe.of("drop-attention:keep=0.8+h2o:keep=0.2")
        >>> [m.name for m in recipe.methods]
        ['drop-attention', 'h2o']
        >>> recipe.to_text()
        'drop-attention:keep=0.8+h2o:keep=0.2'
        >>> print(recipe.to_yaml(), end="")
        - drop-attention:
            keep: 0.8
        - h2o:
            keep: 0.2
        >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
        True
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        policies = [m.name for m in self.methods if m.role == "cache" and m.name != "full"]
        if len(policies) > 1:
            raise FoveateError(
                f"{self.to_text()} holds {len(policies)} cache policies ({', '.join(policies)}), but one cache can "
                "follow only one: drop all but one of them."
            )

    @classmethod
    def of(cls, what: RecipeLike) -> Recipe:
        """A recipe from its text, a path to a YAML file, a method, a list of these, or a recipe itself."""
        if isinstance(what, Recipe):
            return what
        if isinstance(what, Method):
            return cls((what,))
        if isinstance(what, Path) or (isinstance(what, str) and what.endswith((".yaml", ".yml"))):
            try:
                text = Path(what).read_text(encoding="utf-8")
            except OSError as error:
                raise FoveateError(f"the recipe file {what} can't be read: {error.strerror}.") from error
            return cls.from_yaml(text)
        if isinstance(what, str):
            if not what.strip() or any(not part.strip() for part in what.split("+")):
                raise FoveateError(f"{what!r} is no recipe: write name:field=value+name:..., or full.")
            return cls(tuple(METHODS.parse(part) for part in what.split("+")))
        return cls(tuple(m for part in what for m in cls.of(part).methods))

    def to_text(self) -> str:
        return "+".join(m.to_text() for m in self.methods)

    def to_yaml(self) -> str:
        """A YAML list: a method's name alone, or its name over its fields."""
        items: list[Any] = []
        for m in self.methods:
            given = {f.name: getattr(m, f.name) for f in dataclasses.fields(m) if getattr(m, f.name) != f.default}
            items.append({m.name: given} if given else m.name)
        return yaml.safe_dump(items, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """The recipe that `to_yaml` wrote (or a person: a list of names, `name: {field: value}`, or recipe texts)."""
        try:
            items = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise FoveateError(f"the recipe is not valid YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(items, list) or not items:
            raise FoveateError("a recipe in YAML is a list: one `- name` or `- name: {field: value}` for each method.")
        methods: list[Method] = []
        for item in items:
            if isinstance(item, str):
                methods += cls.of(item).methods
            elif isinstance(item, dict) and len(item) == 1 and isinstance(next(iter(item.values())), dict | None):
                name, values = next(iter(item.items()))
                methods.append(METHODS.build(str(name), values or {}))
            else:
                raise FoveateError(f"{item!r} is no method: write `- name` or `- name: {{field: value}}`.")
        return cls(tuple(methods))

    def __str__(self) -> str:
        return self.to_text()


RecipeLike: TypeAlias = "str | Path | Method | Recipe | Iterable[str | Method]"


CALIBRATION_TOKENS = 2048


@contextmanager
def apply(
    model: PreTrainedModel,
    recipe: RecipeLike,
    *,
    context: int | None = None,
    calibration: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[Recipe]:
    """Put a recipe in force on a live model; on leaving the block, nothing of it is left.

    Inside, `model.generate` and plain forwards with `use_cache=True` follow the recipe, whole or in chunks.

    Args:
        model: a Hugging Face causal language model; changed in place until the block ends.
        recipe: text such as `"h2o:keep=0.2"`, a YAML path, methods, or a `Recipe`.
        context: tokens that a cache budget `keep` is a fraction of; by default the prompt (see `CachePolicy`).
        calibration: token ids, LongTensor (1, length), for methods that score units on text; by default the
            calibration part of the text that is always there, under `tokenizer`.
        tokenizer: the model's; by default the one that `load` gave with it.

    Raises:
        FoveateError: unknown method or field, a model whose parts aren't known, a recipe that can't be combined.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> prompt = torch.arange(1, 41).unsqueeze(0)
        >>> with fv.apply(model, "streaming:keep=0.5"):
        ...     out = model(prompt, use_cache=True)
        ...     ids = model.generate(prompt, max_new_tokens=4, do_sample=False)
        >>> int(out.past_key_values.layers[0].held().max())   # entries per KV head: half of 40
        20
    """

    def calibration_ids() -> Tensor:
        if calibration is not None:
            return calibration.to(model.device)
        text = load_text("prose").calibration
        return tokens(text, tokenizer or tokenizer_for(model), CALIBRATION_TOKENS).to(model.device)

    recipe = Recipe.of(recipe)
    with ExitStack() as stack:
        target = Target(model, context, calibration_ids)
        for m in recipe.methods:
            stack.enter_context(m.applied(target))
        yield recipe


# ---- unit scores: the currency between probes, budgets and pruners ------------------------------------------------


@dataclass(frozen=True)
class UnitScores:
    """How much each unit of one kind matters.

    Attributes:
        kind: what a unit is: "layer", "attention", "mlp", "head", "kv_head", "channel" ...
        scores: Tensor (layers, units), float; higher = matters more; NaN = the layer has no such unit.

    Example:
        >>> import torch
        >>> from foveate.methods import UnitScores
        >>> UnitScores("attention", torch.tensor([[0.9], [0.1], [0.5]])).keep(0.67).flatten().tolist()
        [True, False, True]
    """

    kind: str
    scores: Tensor

    def keep(self, fraction: float) -> Tensor:
        """Bool (layers, units): True for the highest-scored `fraction` of all units, at least one of them."""
        there = ~self.scores.isnan()
        total = int(there.sum())
        count = max(1, round(fraction * total))
        best = self.scores.masked_fill(~there, -torch.inf).flatten().topk(count).indices
        mask = torch.zeros(self.scores.numel(), dtype=torch.bool, device=self.scores.device)
        mask[best] = True
        return mask.view_as(self.scores) & there


def check_fraction(who: str, keep: float) -> None:
    """Raise unless `keep` is in (0, 1]."""
    if not 0 < keep <= 1:
        raise FoveateError(f"{who}: keep={keep} is outside (0, 1]: give the fraction to keep, such as 0.2.")
