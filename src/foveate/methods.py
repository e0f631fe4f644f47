"""What every technique is made of: methods, recipes, unit scores, and the registry that finds them.

A **method** is one published technique: a frozen, keyword-only dataclass whose fields are its hyper-parameters.
A **recipe** is an ordered list of methods, as text (`"drop-attention:keep=0.8+h2o:keep=0.2"`), as YAML or as
objects; the three forms round-trip. `apply` puts a recipe in force on a live model and takes it off again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.metadata
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar, cast

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import load_text, tokens
from foveate.errors import FoveateError
from foveate.models.load import known_tokenizer, tokenizer_for
from foveate.models.surgery import Surgery, settle, undone
from foveate.specs import Registry, Spec, split_outside, value_text

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])

ROOMS = ("blocks", "cache", "convert", "depth", "heal", "mixers", "probes", "prune", "steer")
"""The packages under `foveate` that hold techniques, a room for each role."""

CALIBRATION_TOKENS = 2048
"""Tokens of calibration text, where a method asks for no other number."""

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
        calibration: gives calibration token ids, LongTensor (1, length), `CALIBRATION_TOKENS` of them or as many as
            it is asked for (prose, then code), but all there are where the caller of `apply` gave them; called only
            where needed.
        tokenizer: gives the model's tokenizer; called only where needed.
        plans: what pruners decided (`foveate.plans.Plan`), noted as they are applied.
    """

    model: PreTrainedModel
    context: int | None
    calibration: Callable[..., Tensor]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    plans: list[Any] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        *,
        context: int | None = None,
        calibration: Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Target:
        """A target whose calibration text is the one that is always there, unless token ids (1, length) are given."""

        def tokenizer_() -> PreTrainedTokenizerBase:
            return tokenizer or tokenizer_for(model)

        def calibration_ids(length: int = CALIBRATION_TOKENS) -> Tensor:
            if calibration is not None:
                return calibration.to(model.device)
            ids: Tensor = tokens(load_text("prose").calibration, tokenizer_())
            if length > ids.shape[1]:  # all of it, and code
                code = tokens(load_text("code").calibration, tokenizer_(), length - ids.shape[1])
                ids = torch.cat([ids, code], dim=1)
            return ids[:, :length].to(model.device)

        return cls(model, context, calibration_ids, tokenizer_)


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


class Change(Method):
    """Base of methods that change the model itself, so that `fv.thin` can make them permanent.

    A role's base writes `change`; `apply` undoes what it did.
    """

    @abstractmethod
    def change(self, target: Target, surgery: Surgery) -> None:
        """Change `target.model`, every step of it through `surgery`."""

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        with undone(target.model) as surgery:
            self.change(target, surgery)
            yield


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


# ---- techniques that are functions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """A published technique that is called and not applied: it is in the catalog and has a claim, but no recipe.

    Attributes:
        name, role, paper, claim: as of a method.
        call: the function; its keyword-only arguments are the hyper-parameters.
    """

    name: str
    role: str
    paper: Paper
    claim: str
    call: Callable[..., Any]


FUNCTIONS: dict[str, Function] = {}
"""Functions by name; filled as the rooms are imported."""


def function(name: str, *, role: str, paper: Paper, claim: str) -> Callable[[F], F]:
    """Function decorator: register a technique that is a function of the package, `foveate.<name>`."""

    def decorate(call: F) -> F:
        FUNCTIONS[name] = Function(name, role, paper, claim, call)
        return call

    return decorate


class Part(Spec):
    """A technique with a text form that is no method: a budget, a coding, a way to heal, a probe.

    Class attributes: as of a method; `field`, the name of the field or argument that takes it.
    """

    role: ClassVar[str]
    field: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    claim: ClassVar[str]


PARTS: list[Registry[Any]] = []
"""The registries of parts; filled as the rooms are imported."""


def techniques() -> dict[str, type[Method] | type[Part] | Function]:
    """All that was published and is here, by name: methods, functions, and parts."""
    known: dict[str, Any] = {**METHODS.all(), **FUNCTIONS}
    for registry in PARTS:
        known |= registry.all()
    return known


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
            parts = split_outside(what, "+")
            if any(not part.strip() for part in parts):
                raise FoveateError(f"{what!r} is no recipe: write name:field=value+name:..., or full.")
            return cls(tuple(METHODS.parse(part) for part in parts))
        return cls(tuple(m for part in what for m in cls.of(part).methods))

    def to_text(self) -> str:
        return "+".join(m.to_text() for m in self.methods)

    def to_yaml(self) -> str:
        """A YAML list: a method's name alone, or its name over its fields."""
        items: list[Any] = []
        for m in self.methods:
            given = {f.name: getattr(m, f.name) for f in dataclasses.fields(m) if getattr(m, f.name) != f.default}
            given = {k: value_text(v) if isinstance(v, Spec) else v for k, v in given.items()}
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

    recipe = Recipe.of(recipe)
    with ExitStack() as stack:
        target = Target.of(model, context=context, calibration=calibration, tokenizer=tokenizer)
        for m in recipe.methods:
            stack.enter_context(m.applied(target))
        yield recipe


# ---- for good ---------------------------------------------------------------------------------------------------


def check_permanent(recipe: Recipe) -> None:
    """Raise FoveateError where a method is only in force while it is applied."""
    passing = [m.name for m in recipe.methods if not isinstance(m, Change)]
    if passing:
        raise FoveateError(
            f"{', '.join(passing)} can't be made permanent: it is in force only while applied, and a saved model would "
            "not hold it. Leave it out here, and apply it to the smaller model."
        )


def changed(
    model: PreTrainedModel,
    recipe: RecipeLike,
    *,
    calibration: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, list[Any]]:
    """A copy of a model with a recipe's changes made for good, and the plans that its pruners made.

    Args and errors are as of `apply`; a method that is only in force while applied is an error, too.

    Example:
        >>> import foveate as fv, torch
        >>> small, plans = changed(fv.tiny("llama"), "skip-layers:keep=0.5")
        >>> small.config.num_hidden_layers, plans[0].describe()
        (2, 'layer gone: 1, 2')
    """
    recipe = Recipe.of(recipe)
    check_permanent(recipe)
    small = copy.deepcopy(model)
    # The copy was not loaded from anywhere, so that its tokenizer is the original's.
    target = Target.of(small, calibration=calibration, tokenizer=tokenizer or known_tokenizer(model))
    for m in recipe.methods:
        cast(Change, m).change(target, Surgery())
    settle(small)
    return small.eval(), target.plans


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
