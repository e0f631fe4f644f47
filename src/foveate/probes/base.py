"""The probe role: what matters here? A technique writes `measure`, or, to share passes over text, `watch`.

A probe only looks: the model is afterwards as it was. What it found is a `Reading`.
"""

from __future__ import annotations

import functools
import html
import importlib
import json
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import Text, load_text, tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import PARTS, Part, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.load import tokenizer_for
from foveate.specs import Registry

C = TypeVar("C", bound=type)

# ---- what a probe is given ------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a probe reads: texts, cut into passages. All of it is calibration text, so that scores may be spent.

    Attributes:
        tokenizer: the model's.
        text: the reader's text; its calibration part is read, as the stream named after it.
        length: tokens of a passage, or as many as the model has positions.
        passages: passages of each kind of text.
        seed: decides what is drawn at random.
        progress: to be called with the fraction of a probe's work that is done.
    """

    tokenizer: PreTrainedTokenizerBase
    text: Text
    length: int = 512
    passages: int = 4
    seed: int = 0
    progress: Callable[[float], None] = field(default=lambda done: None, repr=False)

    def __post_init__(self) -> None:
        if self.length < 16 or self.passages < 1:
            raise FoveateError(
                f"a reading of {self.passages} passages of {self.length} tokens was asked for: give 1 passage or more "
                "of at least 16 tokens."
            )

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, text: str = "prose", **given: Any
    ) -> Data:
        """Data for a model: by default the text that is always there, under the tokenizer that `load` gave.

        Example:
            >>> import foveate as fv
            >>> Data.of(fv.tiny("llama"), fv.tiny_tokenizer(), length=32).passages
            4
        """
        return cls(tokenizer or tokenizer_for(model), load_text(text), **given)

    def stream(self, name: str, model: PreTrainedModel) -> Tensor:
        """The passages of a stream: token ids, LongTensor (passages, length), on the model's device.

        Args:
            name: "prose", "code" or "mine" (the reader's text): passages spread evenly over its calibration part.
                "repeat": random tokens, the second half of each passage the same as the first.
            model: for its vocabulary, positions and device.

        Raises:
            FoveateError: a text that is too short.
        """
        length = min(self.length, anatomy(model).max_positions)
        if name == "repeat":
            generator = torch.Generator().manual_seed(self.seed)
            ordinary = self.ordinary(model)
            half = ordinary[torch.randint(len(ordinary), (self.passages, length // 2), generator=generator)]
            return torch.cat([half, half], dim=1).to(model.device)
        text = self.text if name in ("mine", self.text.name) else load_text(name)
        ids = _encoded(text.calibration, self.tokenizer)
        room = ids.shape[1] - length
        if ids.shape[1] < self.passages * length:  # or they would overlap, and intervals would be too narrow
            raise FoveateError(
                f"the calibration part of the text {text.name} has {ids.shape[1]} tokens, and {self.passages} passages "
                f"of {length} were asked for: give a longer text, or passages of at most "
                f"{ids.shape[1] // self.passages} tokens."
            )
        starts = [room * i // max(1, self.passages - 1) for i in range(self.passages)]
        return torch.cat([ids[:, start : start + length] for start in starts]).to(model.device)

    def alias(self, name: str) -> str:
        """The stream that a name stands for: "mine" is "prose" or "code" where the reader's text is that.

        Example:
            >>> import foveate as fv
            >>> Data.of(fv.tiny("llama"), fv.tiny_tokenizer()).alias("mine")
            'prose'
        """
        return self.text.name if name == "mine" and self.text.name in ("prose", "code") else name

    def ordinary(self, model: PreTrainedModel) -> Tensor:
        """The tokens that are no special ones, LongTensor (n,)."""
        special = {i for i in self.tokenizer.all_special_ids if i is not None}
        count = min(anatomy(model).vocab, len(self.tokenizer))
        return torch.tensor([i for i in range(count) if i not in special])


@functools.lru_cache(maxsize=8)
def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return tokens(text, tokenizer)


# ---- what a probe finds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Role:
    """What one unit does.

    Attributes:
        kind: "head", "mlp", "layer" ...
        layer, unit: which one; of "mlp" and "layer", unit 0.
        role: a word or two, the same for all that do the same: "induction".
        score: how clearly, the higher the more.
        words: one sentence for somebody who never opened a paper.
    """

    kind: str
    layer: int
    unit: int
    role: str
    score: float
    words: str

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.unit}" if self.kind == "head" else f"{self.kind} {self.layer}"


@dataclass(frozen=True)
class Lines:
    """Curves: name -> points (x, y), under a title, with what the axes are called."""

    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    kind: str = "lines"


@dataclass(frozen=True)
class Rows:
    """A table: heads of the columns, and rows of text and numbers."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    kind: str = "rows"


@dataclass(frozen=True)
class Marked:
    """A text, token by token, each with a weight from 0 to 1 that it is marked by."""

    title: str
    tokens: list[str]
    weights: list[float]
    kind: str = "marked"


@dataclass(frozen=True)
class Grid:
    """A picture of numbers, rows x columns, such as a matrix between layers."""

    title: str
    x: str
    y: str
    values: list[list[float | None]]
    kind: str = "grid"


Panel = Lines | Rows | Marked | Grid
_PANELS: dict[str, Callable[..., Panel]] = {"lines": Lines, "rows": Rows, "marked": Marked, "grid": Grid}


@dataclass(frozen=True)
class Reading:
    """What one probe found.

    Attributes:
        probe: the probe's text, such as "sinks".
        title: what it asks, in a few words.
        summary: what it found here, a sentence or two, for somebody who never opened a paper.
        metrics: figures with intervals, by name.
        scores: scores of units by name, for budgets and pruners: higher = matters more.
        roles: what single units do, where it is clear; empty where nothing is.
        panels: what else there is to see.
        setting: all that determined it: passages, lengths, thresholds.
        seconds: how long it took.

    Example:
        >>> import torch
        >>> reading = Reading("mine", "a try", "Nothing.", scores={"size": UnitScores("head", torch.rand(2, 4))})
        >>> Reading.from_json(reading.to_json()) .scores["size"].kind
        'head'
    """

    probe: str
    title: str
    summary: str
    metrics: dict[str, Metric] = field(default_factory=dict)
    scores: dict[str, UnitScores] = field(default_factory=dict)
    roles: list[Role] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    setting: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def of_role(self, role: str) -> list[tuple[int, int]]:
        """The units that have a role, (layer, unit), the clearest first."""
        having = sorted((each for each in self.roles if each.role == role), key=lambda each: -each.score)
        return [(each.layer, each.unit) for each in having]

    def to_json(self) -> dict[str, Any]:
        """As plain dictionaries and lists. Numbers that are not finite become None."""
        scores = {name: {"kind": s.kind, "scores": _plain(s.scores)} for name, s in self.scores.items()}
        rest = {
            "probe": self.probe,
            "title": self.title,
            "summary": self.summary,
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "roles": [asdict(role) for role in self.roles],
            "panels": [asdict(panel) for panel in self.panels],
            "setting": self.setting,
            "seconds": round(self.seconds, 2),
        }
        return typing.cast(dict[str, Any], _finite({**rest, "scores": scores}))

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Reading:
        """What `to_json` gave."""

        def number(value: float | None) -> float:
            return float("nan") if value is None else value

        panels = [_PANELS[panel["kind"]](**panel) for panel in given["panels"]]
        return cls(
            given["probe"],
            given["title"],
            given["summary"],
            {name: Metric(*(number(m[k]) for k in ("value", "low", "high"))) for name, m in given["metrics"].items()},
            {
                name: UnitScores(s["kind"], torch.tensor([[number(x) for x in row] for row in s["scores"]]))
                for name, s in given["scores"].items()
            },
            [Role(**role) for role in given["roles"]],
            panels,
            given["setting"],
            given["seconds"],
        )

    def to_frame(self) -> Any:
        """Scores as a pandas DataFrame, a row for each unit of each score: score, kind, layer, unit, value, roles.

        Raises:
            FoveateError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise FoveateError("a frame needs the package pandas: pip install 'foveate[notebook]'.") from error
        roles: dict[tuple[str, int, int], list[str]] = {}
        for role in self.roles:
            roles.setdefault((role.kind, role.layer, role.unit), []).append(role.role)
        rows = [
            (name, s.kind, layer, unit, float(s.scores[layer, unit]), ", ".join(roles.get((s.kind, layer, unit), [])))
            for name, s in self.scores.items()
            for layer in range(s.scores.shape[0])
            for unit in range(s.scores.shape[1])
        ]
        return pandas.DataFrame(rows, columns=["score", "kind", "layer", "unit", "value", "roles"])

    def _repr_html_(self) -> str:
        """For notebooks: the summary, and each score as a picture."""
        pictures = "".join(
            f"<figure style='display:inline-block;margin:.5em 1em .5em 0'><figcaption>{html.escape(name)} "
            f"({html.escape(s.kind)})</figcaption>{heat_map(s)}</figure>"
            for name, s in self.scores.items()
        )
        return f"<div><b>{html.escape(self.title)}</b><p>{html.escape(self.summary)}</p>{pictures}</div>"


def heat_map(scores: UnitScores) -> str:
    """Scores as an SVG: layers from top to bottom, units from left to right, the higher the darker.

    Example:
        >>> heat_map(UnitScores("head", torch.tensor([[0.0, 1.0]]))).count("<rect")
        2
    """
    values = scores.scores.float()
    there = values[~values.isnan()]
    low, high = (float(there.min()), float(there.max())) if len(there) else (0.0, 1.0)
    cells = [
        f"<rect x='{12 * unit}' y='{12 * layer}' width='11' height='11' fill='#0d7bc4' "
        f"fill-opacity='{0.06 + 0.94 * (value - low) / ((high - low) or 1):.2f}'><title>{html.escape(scores.kind)} "
        f"{layer}.{unit}: {value:.3g}</title></rect>"
        for layer, row in enumerate(values.tolist())
        for unit, value in enumerate(row)
        if value == value  # not NaN
    ]
    width, height = 12 * values.shape[1], 12 * values.shape[0]
    label = html.escape(f"{scores.kind} scores, layers from top to bottom")
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' role='img' aria-label='{label}'>"
        f"{''.join(cells)}</svg>"
    )


def _plain(scores: Tensor) -> list[list[float]]:
    return [[float(f"{x:.6g}") for x in row] for row in scores.double().cpu().tolist()]


def _finite(value: Any) -> Any:
    """The same with None for every number that JSON has no word for, and tensors' numbers as Python's."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "tolist"):  # of torch or NumPy
        return _finite(value.tolist())
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, str | int | bool) else json.loads(json.dumps(value, default=str))


# ---- what a probe is ------------------------------------------------------------------------------------------------


class Probe(Part, ABC):
    """Base of probes: frozen dataclasses of their settings. A technique writes `measure`.

    Class attributes: `name`, `paper`, `claim` as of a method; `title`, what it asks, in a few words; `default`, whether
    a reading that names no probes has it.
    """

    role: ClassVar[str] = "probe"
    field: ClassVar[str] = "probe"
    title: ClassVar[str]
    default: ClassVar[bool] = False

    def check(self, model: PreTrainedModel, data: Data) -> None:
        """Raise FoveateError where it can't be measured on this model and text, before any work."""
        anatomy(model)

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        """Work, in tokens through the model, a backward counting as two: what is told before, and the time left."""
        return float(data.passages * data.length)

    @abstractmethod
    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        """Look at the model. `data.progress` is to be called with the fraction done."""


def load_probes() -> None:
    """Import this room, so that all probes register."""
    importlib.import_module("foveate.probes")


PROBES: Registry[Probe] = Registry("probe", load_probes)
PARTS.append(PROBES)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def probe(name: str) -> Callable[[C], C]:
    """Class decorator: register a probe under its short name, as a frozen keyword-only dataclass."""
    return PROBES.register(name)


@contextmanager
def quiet(model: PreTrainedModel) -> Iterator[None]:
    """While in force, the model is in eval mode; afterwards each module is in the mode in which it was.

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama").train()
        >>> with quiet(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def clear_heads(
    scores: UnitScores, least: float, role: str, words: Callable[[float], str], most: int | None = None
) -> list[Role]:
    """A role for every unit whose score is at least `least`, the highest first; at most `most` of them.

    Example:
        >>> scores = UnitScores("head", torch.tensor([[0.1, 0.8]]))
        >>> found = clear_heads(scores, 0.5, "sink", lambda s: f"rests: {s:.0%}")
        >>> found[0].name, found[0].words
        ('0.1', 'rests: 80%')
    """
    having = [
        Role(
            scores.kind, layer, unit, role, float(scores.scores[layer, unit]), words(float(scores.scores[layer, unit]))
        )
        for layer, unit in (scores.scores >= least).nonzero().tolist()
    ]
    return sorted(having, key=lambda each: -each.score)[:most]


def counted(count: int, word: str) -> str:
    """A count with its word, in the plural where it is not one.

    Example:
        >>> counted(1, "head"), counted(3, "head")
        ('1 head', '3 heads')
    """
    return f"{count} {word}{'' if count == 1 else 's'}"


def named(units: Sequence[tuple[int, int]] | Sequence[Role], most: int = 6) -> str:
    """Units in words: `"1.3, 2.0 and 4 more"`.

    Example:
        >>> named([(1, 3), (2, 0), (2, 1)], most=2)
        '1.3, 2.0 and 1 more'
    """
    names = [each.name if isinstance(each, Role) else f"{each[0]}.{each[1]}" for each in units]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
