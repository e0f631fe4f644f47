"""Foveate: see where a trained network's compute matters, spend it only there, and prove what that cost in quality.

The public names are imported when they are first used, so that `import foveate` itself is quick.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from foveate.version import __version__

if TYPE_CHECKING:
    from foveate.backbone import BackboneConfig, Mixer, TokenMixer, mixer
    from foveate.cache import CachePolicy, CacheView, DecodeLoop
    from foveate.cache.blend import ChunkCache, blend
    from foveate.catalog import catalog
    from foveate.claims import Claim, Finding, claim
    from foveate.compare import Comparison, compare
    from foveate.compare.mixers import MixerComparison, compare_mixers
    from foveate.data.text import Text, load_text
    from foveate.depth import DepthPlan
    from foveate.errors import FoveateError
    from foveate.heal import Heal, HealReport, heal
    from foveate.measure.bootstrap import Metric
    from foveate.methods import Method, Paper, Recipe, Target, UnitScores, apply, method
    from foveate.mixers.recurrence_forms import recurrence
    from foveate.models.anatomy import Anatomy, Family, anatomy, register_family
    from foveate.models.load import load
    from foveate.models.planted import planted
    from foveate.models.tiny import tiny, tiny_tokenizer
    from foveate.probes import Data, Probe, Reading, Watch, Watcher, probe
    from foveate.probes.information_plane import InformationPlane, information_plane
    from foveate.probes.rerank import Ranking, rerank
    from foveate.probes.select_and_copy import choose
    from foveate.prune import Pruner
    from foveate.read import Readings, read
    from foveate.search import SearchResult, search
    from foveate.steer.unordered import unordered
    from foveate.tasks import Bench, Outcome, Task, task
    from foveate.thin import thin
    from foveate.train import Settings, Sizes, Trained, train
    from foveate.verify import verify

_HOMES = {
    "foveate.backbone": ("BackboneConfig", "Mixer", "TokenMixer", "mixer"),
    "foveate.cache": ("CachePolicy", "CacheView", "DecodeLoop"),
    "foveate.cache.blend": ("ChunkCache", "blend"),
    "foveate.catalog": ("catalog",),
    "foveate.claims": ("Claim", "Finding", "claim"),
    "foveate.compare": ("Comparison", "compare"),
    "foveate.compare.mixers": ("MixerComparison", "compare_mixers"),
    "foveate.data.text": ("Text", "load_text"),
    "foveate.depth": ("DepthPlan",),
    "foveate.errors": ("FoveateError",),
    "foveate.heal": ("Heal", "HealReport", "heal"),
    "foveate.measure.bootstrap": ("Metric",),
    "foveate.methods": ("Method", "Paper", "Recipe", "Target", "UnitScores", "apply", "method"),
    "foveate.mixers.recurrence_forms": ("recurrence",),
    "foveate.models.anatomy": ("Anatomy", "Family", "anatomy", "register_family"),
    "foveate.models.load": ("load",),
    "foveate.models.planted": ("planted",),
    "foveate.models.tiny": ("tiny", "tiny_tokenizer"),
    "foveate.probes": ("Data", "Probe", "Reading", "Watch", "Watcher", "probe"),
    "foveate.probes.information_plane": ("InformationPlane", "information_plane"),
    "foveate.probes.rerank": ("Ranking", "rerank"),
    "foveate.probes.select_and_copy": ("choose",),
    "foveate.prune": ("Pruner",),
    "foveate.read": ("Readings", "read"),
    "foveate.search": ("SearchResult", "search"),
    "foveate.steer.unordered": ("unordered",),
    "foveate.thin": ("thin",),
    "foveate.tasks": ("Bench", "Outcome", "Task", "task"),
    "foveate.train": ("Settings", "Sizes", "Trained", "train"),
    "foveate.verify": ("verify",),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_WHERE]


class _Package(types.ModuleType):
    """Lets a verb and its module share a name: `foveate.compare` is the function, whatever was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
