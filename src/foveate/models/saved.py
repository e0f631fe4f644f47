"""Saving a model that was cut or converted, so that it opens anywhere: with foveate, and without it."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.errors import FoveateError
from foveate.models.anatomy import stock_type
from foveate.models.card import Story, card
from foveate.models.form import Form, form, stock_classes
from foveate.models.modelling import AUTO_MAP, write_code
from foveate.models.source import cache_dir, quiet, reason
from foveate.portable.parts import told
from foveate.version import __version__

__all__ = ["Story", "card", "is_plain", "save"]

MARK = "foveate.json"
"""The file by which a folder is known as one of ours."""

_SPARE = 64 * 2**20
"""Bytes that a folder takes beside the weights, at most: the tokenizer, for the most part."""


def is_plain(model: PreTrainedModel) -> bool:
    """Whether a model has a shape that its stock architecture's configuration alone gives.

    Raises:
        FoveateError: it can't be saved at all.

    Example:
        >>> import foveate as fv
        >>> is_plain(fv.tiny("llama"))
        True
    """
    return form(model).thin is None


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    card: str,
    extra: Mapping[str, str] | None = None,
) -> str:
    """Write a model into a folder that opens anywhere, whole or not at all.

    A regular shape is saved as a stock model. Another one takes a modelling file along, and opens with
    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` where foveate is not installed, and with
    `foveate.load(folder)`, which runs no code of the folder.

    Args:
        model: a live model, settled (`foveate.models.surgery.settle`), which stays as it is.
        tokenizer: the model's; None: the folder has none.
        folder: a new folder, an empty one, or a model that was saved here before, which is replaced in one step.
        card: the text of README.md.
        extra: other files, name -> text. `foveate.json`, a JSON object, is completed with what the folder is.

    Returns:
        "plain" or "irregular".

    Raises:
        FoveateError: a part that can't be saved, a folder with something else in it, no room on the disk.

    Example:
        >>> import tempfile, foveate as fv
        >>> save(fv.tiny("llama"), fv.tiny_tokenizer(), Path(tempfile.mkdtemp()) / "small", card="A test.")
        'plain'
    """
    folder = Path(folder).expanduser().absolute()
    how = form(model)
    weights = _weights(model, how)
    need = sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) + _SPARE
    with _in_one_step(folder, need) as part:
        _complete_config(how)
        # The configuration that is written is the rebuilt model's; a type of our own has no other names for weights.
        with quiet(), told(model, {"config": how.config}):
            PreTrainedModel.save_pretrained(model, part, state_dict=weights, save_original_format=how.thin is None)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
        _complete_config(how)  # save_pretrained named the live model's class
        (part / "config.json").write_text(how.config.to_json_string(), encoding="utf-8")
        if how.thin is not None:
            write_code(part, how.config, stock_classes(stock_type(how.config))[1])
        for name, text in {"README.md": card, **(extra or {})}.items():
            if Path(name).name != name or (part / name).exists():
                raise FoveateError(f"{name} can't be an extra file of {folder}: give it another plain name.")
            (part / name).write_text(text, encoding="utf-8")
        shape = "plain" if how.thin is None else "irregular"
        _write_mark(part, shape)
    return shape


# ---- what is written ------------------------------------------------------------------------------------------------


def _weights(model: PreTrainedModel, how: Form) -> dict[str, Tensor]:
    """The state dictionary to save: tied weights once, other shared ones as often as they are named."""
    weights = dict(model.state_dict())
    tied = model.get_expanded_tied_weights_keys(all_submodels=True) if how.config.tie_word_embeddings else {}
    for name in tied:
        weights.pop(name, None)
    seen: set[int] = set()
    for name, tensor in weights.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen and tensor.device.type != "meta":
            weights[name] = tensor.clone()
        seen.add(place)
    for name in how.zeros:
        beside: Tensor = model.get_parameter(name.removesuffix("bias") + "weight")
        weights[name] = torch.zeros(beside.shape[0], dtype=beside.dtype, device=beside.device)
    return weights


def _complete_config(how: Form) -> None:
    """Say in the configuration which class opens the model, and what differs."""
    config = how.config
    config.architectures = [stock_classes(stock_type(config))[1].__name__ if how.thin is None else "ThinForCausalLM"]
    if how.thin is not None:
        config.thin = how.thin
        config.auto_map = AUTO_MAP


def _write_mark(part: Path, shape: str) -> None:
    told = json.loads((part / MARK).read_text(encoding="utf-8")) if (part / MARK).exists() else {}
    files = sorted({each.name for each in part.iterdir()} | {MARK})
    mark = {"foveate_model": 1, "foveate": __version__, "shape": shape, **told, "files": files}
    (part / MARK).write_text(json.dumps(mark, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- whole or not at all --------------------------------------------------------------------------------------------


@contextmanager
def _in_one_step(folder: Path, need: int) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends well, else leaves no trace."""
    check_folder(folder)
    leftovers = f".{folder.name}.foveate-*"
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(cache_dir() / "locks" / f"{key}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock.acquire(timeout=0):
            for leftover in folder.parent.glob(leftovers):  # of a save that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            _check_room(folder, need)
            part = folder.parent / leftovers.replace("*", str(os.getpid()))
            part.mkdir()
            try:
                yield part
                _sync(part)
                check_folder(folder)
                _swap(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except Timeout as error:
        raise FoveateError(f"{folder} is being written by another process: wait for it.") from error
    except (OSError, SafetensorError) as error:
        raise FoveateError(
            f"the model can't be written to {folder} ({reason(error)}), and what was there is as it was: make room, "
            "or give another folder."
        ) from error


def check_folder(folder: Path) -> None:
    """Raise unless a model may be written there."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FoveateError(f"{folder} is a file, so no model can be saved there: give another folder.")
    names = {each.name for each in folder.iterdir()}
    if not names:
        return
    try:
        ours = set(json.loads((folder / MARK).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise FoveateError(
            f"{folder} is not empty, and holds no model that foveate saved: give another folder, or empty it first."
        ) from None
    if strange := sorted(names - ours):
        raise FoveateError(
            f"{folder} holds {', '.join(strange[:3])}, which foveate did not write and would be lost: move it away, or "
            "give another folder."
        )


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise FoveateError(
            f"the model takes {need / 2**30:.1f} GiB, and {folder.parent} has {free / 2**30:.1f} GiB free (a model "
            "that is replaced goes only when the new one is whole): make room, or give another folder."
        )


def _sync(folder: Path) -> None:
    """See all of a folder onto the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(part: Path, folder: Path) -> None:
    """Put a folder in the place of another, which is then where the first was."""
    if not folder.exists() or not any(folder.iterdir()):
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    elif not _exchange(part, folder):
        # Two steps: between them there is no folder, and the old one lies beside it.
        aside = part.with_name(f"{part.name}-old")
        folder.rename(aside)
        part.rename(folder)
        aside.rename(part)
    if os.name == "posix":
        handle = os.open(folder.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places at once, where the system can."""
    if sys.platform != "linux":
        return False
    rename: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None or rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return rename is not None
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):  # not on this file system
        return False
    raise OSError(code, os.strerror(code), str(other))
