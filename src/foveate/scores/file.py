"""Scores that a reading measured, from its file: what budgets and pruners spend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from foveate.errors import FoveateError
from foveate.methods import UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.stored import kin
from foveate.models.surgery import KINDS, unit_counts
from foveate.specs import nearest

FORMAT = 1
"""Of `reading.json`."""


def load_scores(path: str | Path, name: str, model: PreTrainedModel | None = None) -> UnitScores:
    """The scores called `name` in a reading's file.

    Args:
        path: `reading.json`, or the folder that it lies in.
        name: `probe.score`, such as "layers.attention"; the probe alone where it has only one score.
        model: where given, the scores must be of this model, whole or cut.

    Raises:
        FoveateError: no such file or score, a damaged file, scores of another model.

    Example:
        >>> import tempfile, foveate as fv
        >>> model = fv.planted()
        >>> with tempfile.TemporaryDirectory() as out:
        ...     read = fv.read(model, ["induction"], tokenizer=fv.tiny_tokenizer(), length=64, out=out, show=False)
        ...     scores = load_scores(out, "induction.previous", model)
        >>> scores.kind, int(scores.scores.argmax())    # head 0.1
        ('head', 1)
    """
    given = read_file(path)
    try:
        known: dict[str, Any] = {
            f"{probe}.{score}": of
            for probe, reading in given["readings"].items()
            for score, of in reading["scores"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path) from error
    alone = [full for full in known if full.partition(".")[0] == name]
    full = alone[0] if len(alone) == 1 else name
    if full not in known:
        raise FoveateError(f"{path} has no scores called {name!r}: {nearest(name, known)}")
    if model is not None:
        if given["kin"] != kin(model):
            raise FoveateError(
                f"{path} is a reading of {given['model']}, and these scores were to be spent on another model: read "
                "that model, or give its reading."
            )
        layers = len(anatomy(model).layers)
        if len(known[full]["scores"]) != layers:
            raise FoveateError(
                f"{path} is of a model of {len(known[full]['scores'])} layers, and this one has {layers}: read it as "
                "it is now."
            )
    rows = [[float("nan") if x is None else x for x in row] for row in known[full]["scores"]]
    scores = UnitScores(known[full]["kind"], torch.tensor(rows))
    if model is not None and scores.kind in KINDS:
        there = unit_counts(model, scores.kind)
        if scores.kind != "hidden":  # what has left as a whole has no score any more
            scores.scores[torch.tensor(there) == 0] = torch.nan
        if any(0 < n != count for n, count in zip((~scores.scores.isnan()).sum(1).tolist(), there, strict=True)):
            raise FoveateError(
                f"{path} scores units of kind {scores.kind} of the model before some of them were cut: read it as it "
                "is now."
            )
    return scores


def damaged(path: str | Path) -> FoveateError:
    """The error for a file that holds no reading."""
    return FoveateError(f"{path} holds no reading, or a damaged one: run `foveate read` again.")


def read_file(path: str | Path) -> dict[str, Any]:
    """A reading's file as it is.

    Raises:
        FoveateError: it is not there, damaged, or of another format.
    """
    file = Path(path).expanduser()
    file = file / "reading.json" if file.is_dir() else file
    try:
        given: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version, _ = given["format"], (given["readings"], given["kin"], given["model"])
    except FileNotFoundError as error:
        raise FoveateError(f"there is no reading at {path}: `foveate read MODEL --out DIR` writes one.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file) from error
    if version != FORMAT:
        raise FoveateError(
            f"{file} has format {version}, and this foveate reads format {FORMAT}: read the model again."
        )
    return given
