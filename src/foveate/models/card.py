"""The card of a saved model: what was done to it, and what that cost, for people and as data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from foveate.models.source import DEFAULT_HUB_ID, DEFAULT_MODEL

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-!|~>$.:@=])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Story:
    """How a model came to be. All values are JSON-ready, and none is trusted: the card escapes every text.

    Attributes:
        name: the model's, for the card's title.
        base_model: what it was made from: a Hub id, or a name.
        recipe: what was done to it, as text.
        shape: "plain" or "irregular", as `save` returns it.
        plans: for each plan that was carried out, what it says in a few words (`Plan.describe`).
        scores: as pruners found them, one after the other: kind of unit, and of each layer's units the lowest, the
            median and the highest score (None where it has none).
        text: what was read on the way, use -> text, such as "calibration" -> "prose, 2,048 tokens".
        heal: how it was healed, name -> value; empty: it was not.
        before, after: figures of the original and of this model, name -> `Metric.to_json()`.
        versions: package -> version.
        license: the base model's, by its Hub name, where it is known.
    """

    name: str
    base_model: str
    recipe: str
    shape: str
    plans: Sequence[str] = ()
    scores: Sequence[tuple[str, Sequence[Sequence[float] | None]]] = ()
    text: Mapping[str, str] = field(default_factory=dict)
    heal: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    after: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As data, for foveate.json."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def card(story: Story) -> str:
    """The text of README.md: markdown under a YAML header, as model hubs read it.

    Example:
        >>> text = card(Story(name="small", base_model="smollm2-135m", recipe="flap:keep=0.8", shape="plain"))
        >>> print(text[: text.index("# small")])
        ---
        base_model: HuggingFaceTB/SmolLM2-135M-Instruct
        library_name: transformers
        pipeline_tag: text-generation
        tags:
        - foveate
        ---
        <BLANKLINE>
        <BLANKLINE>
    """
    sections = [
        _header(story),
        f"# {_text(story.name)}",
        f"Made from {_text(story.base_model)} by the recipe {_code(story.recipe)}, with "
        "[foveate](https://pypi.org/project/foveate/).",
        _how_to_open(story),
        _list("What was cut", [_text(plan) for plan in story.plans]),
        _list("Scores of each layer's units: lowest, median, highest", [_scores(*each) for each in story.scores]),
        _list("Text that was read", [f"{_text(use)}: {_text(text)}" for use, text in story.text.items()]),
        _list("Healing", [f"{_text(name)}: {_text(value)}" for name, value in story.heal.items()]),
        _figures(story),
        _list("Versions", [f"{_text(name)} {_text(version)}" for name, version in story.versions.items()]),
        "`foveate.json` has the same as data.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(story: Story) -> str:
    base = DEFAULT_HUB_ID if story.base_model == DEFAULT_MODEL else story.base_model
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["foveate"]}
    if _HUB_ID.fullmatch(base):  # hubs take nothing else there
        header["base_model"] = base
    if story.license is not None:
        header["license"] = story.license
    return f"---\n{yaml.safe_dump(header, allow_unicode=True)}---"


def _how_to_open(story: Story) -> str:
    remote = "" if story.shape == "plain" else ", trust_remote_code=True"
    lines = [
        "## How to open it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained(folder{remote})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{remote})",
        "```",
        "",
    ]
    if story.shape == "plain":
        lines.append("It has a regular shape of its architecture, so whatever reads that architecture opens it.")
    else:
        lines.append(
            "Its layers differ in shape, which no stock architecture has. `modeling_thin.py` and the files beside it "
            "are short, and need torch and transformers only. `foveate.load(folder)` runs no code of the folder."
        )
    return "\n".join(lines)


def _list(title: str, items: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {item}" for item in items)]) if items else ""


def _scores(kind: str, layers: Sequence[Sequence[float] | None]) -> str:
    words = ["none" if row is None else " ".join(f"{each:.3g}" for each in row) for row in layers]
    return _text(f"{kind}: {', '.join(words)}")


def _figures(story: Story) -> str:
    names = [*story.before, *(name for name in story.after if name not in story.before)]
    if not names:
        return ""
    rows = [
        f"| {_text(name)} | {_figure(story.before.get(name))} | {_figure(story.after.get(name))} |" for name in names
    ]
    note = "In brackets: the 95% interval, where the figure was estimated."
    return "\n".join(["## Figures", "", "| | before | after |", "|---|---:|---:|", *rows, "", note])


def _figure(metric: Mapping[str, float] | None) -> str:
    if metric is None:
        return ""
    value, low, high = (float(metric[end]) for end in ("value", "low", "high"))
    return _number(value) if low == high else f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def _text(value: Any) -> str:
    """Any text as itself, in one line: nothing in it is markup."""
    line = " ".join(str(value).split())
    return _MARKDOWN.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def _code(value: str) -> str:
    """Any text as a code span: its fence is longer than every run of backticks in it."""
    line = " ".join(value.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"
