"""The grid: which cells there are, what determines each of them, and profiles, grids with a name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import transformers
from transformers import PreTrainedModel

from foveate.data.text import Text
from foveate.errors import FoveateError
from foveate.methods import Recipe, RecipeLike
from foveate.specs import nearest
from foveate.tasks import TASKS, Task
from foveate.version import __version__

FORMAT = 1
"""Of cell files and run.json; raised when a change makes older ones unreadable."""

TaskLike: TypeAlias = "str | Task"


@dataclass(frozen=True)
class Profile:
    """A grid that has a name: recipe texts, task texts, and what it is for."""

    about: str
    recipes: tuple[str, ...]
    tasks: tuple[str, ...]


PROFILES = {
    "quick": Profile(
        about="every kind of technique at one budget or two, in minutes on two CPU cores",
        recipes=(
            "full",
            "window:keep=0.25",
            "streaming:keep=0.25",
            "h2o:keep=0.25",
            "h2o:keep=0.5",
            "skip-layers:keep=0.9",
            "drop-attention:keep=0.87+h2o:keep=0.5",
        ),
        tasks=(
            "perplexity:tokens=2048,window=1024",
            "passkey:cases=4,tokens=512",
            "held",
            "generate:samples=2,prompt=256,tokens=32",
            "speed:prompt=512,tokens=12,repeats=3",
        ),
    ),
    "standard": Profile(
        about="longer texts, more cases, several budgets; an hour on a CPU, minutes on a GPU",
        recipes=(
            "full",
            *(f"{name}:keep={keep}" for name in ("window", "streaming", "h2o") for keep in (0.1, 0.2, 0.5)),
            "skip-layers:keep=0.9",
            "skip-layers:keep=0.8",
            "drop-attention:keep=0.87",
            "drop-attention:keep=0.87+h2o:keep=0.2",
        ),
        tasks=(
            "perplexity:tokens=16384",
            "passkey:cases=20,tokens=1024",
            "copy",
            "held",
            "generate",
            "speed",
        ),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One measurement: model x recipe x task x setting.

    Attributes:
        model: the model's name, for people; `setting["weights"]` says which weights these were.
        recipe, task: in their text form.
        setting: all else that determines the result (see `setting_of`).

    Example:
        >>> a = Cell("tiny", "full", "perplexity", {"seed": 0})
        >>> len(a.id), a.id == Cell("tiny", "full", "perplexity", {"seed": 1}).id
        (16, False)
    """

    model: str
    recipe: str
    task: str
    setting: Mapping[str, Any] = field(hash=False)

    @property
    def id(self) -> str:
        """16 hexadecimal digits that are the same exactly where everything that determines the result is."""
        return digest({"format": FORMAT} | self.to_json())[:16]

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "recipe": self.recipe, "task": self.task, "setting": dict(self.setting)}


def digest(what: Any) -> str:
    """SHA-256 of the canonical JSON of `what`."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def profile(name: str) -> Profile:
    """The profile of that name; FoveateError where there is none.

    Example:
        >>> profile("quick").recipes[0]
        'full'
    """
    if name not in PROFILES:
        raise FoveateError(f"there is no profile called {name!r}: {nearest(name, PROFILES)}")
    return PROFILES[name]


def parse_recipes(recipes: Iterable[RecipeLike]) -> list[Recipe]:
    """Recipes from any of their forms, each once, in the order given; FoveateError where there is none.

    Example:
        >>> [str(recipe) for recipe in parse_recipes(["full", "window:keep=0.50", "full"])]
        ['full', 'window:keep=0.5']
    """
    parsed = list(dict.fromkeys(Recipe.of(recipe) for recipe in recipes))
    if not parsed:
        raise FoveateError("no recipe was given: name at least one, such as full.")
    return parsed


def parse_tasks(tasks: Iterable[TaskLike]) -> list[Task]:
    """Tasks from their texts or as objects, each once, in the order given; FoveateError where there is none.

    Example:
        >>> [str(task) for task in parse_tasks(["passkey", "perplexity:tokens=512"])]
        ['passkey', 'perplexity:tokens=512']
    """
    parsed = list(dict.fromkeys(TASKS.parse(task) if isinstance(task, str) else task for task in tasks))
    if not parsed:
        raise FoveateError("no task was given: name at least one, such as perplexity.")
    return parsed


def cells(model: str, recipes: Sequence[Recipe], tasks: Sequence[Task], setting: Mapping[str, Any]) -> list[Cell]:
    """The grid's cells, all recipes of a task together: a run that is stopped early can still be compared.

    Example:
        >>> recipes, tasks = parse_recipes(["full", "window:keep=0.5"]), parse_tasks(["perplexity", "passkey"])
        >>> [(cell.task, cell.recipe) for cell in cells("tiny", recipes, tasks, {})][:2]
        [('perplexity', 'full'), ('perplexity', 'window:keep=0.5')]
    """
    return [Cell(model, recipe.to_text(), task.to_text(), setting) for task in tasks for recipe in recipes]


def setting_of(model: PreTrainedModel, text: Text, seed: int) -> dict[str, Any]:
    """What determines a result beside recipe and task: numbers, place, versions, weights and text."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "seed": seed,
        "text": text.name,
        "text_digest": text.digest,
        "weights": weights_digest(model),
    } | versions()


def versions() -> dict[str, str]:
    """Of the packages whose numbers end up in a result."""
    return {
        "foveate": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


@torch.no_grad()
def weights_digest(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that change when a weight or the configuration does.

    Each parameter counts with the sum of its bits read as integers: exact, so that it does not depend on the
    number of threads or the device, and quick enough for large models.

    Example:
        >>> from foveate.models.tiny import tiny
        >>> weights_digest(tiny("llama")) == weights_digest(tiny("llama", seed=1))
        False
    """
    sums = {}
    for name, tensor in model.state_dict().items():
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
        sums[name] = [list(tensor.shape), int(bits.sum(dtype=torch.int64))]
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    return digest([sums, json.loads(json.dumps(config, default=str))])[:16]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element
_NOT_THE_MODEL = {"_name_or_path", "transformers_version"}
