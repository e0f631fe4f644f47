"""Text that is always there, a file or a Hub data set: a part to calibrate on, a part to be judged by."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from foveate.errors import FoveateError

CALIBRATION_SHARE = 0.2
MOST_CHARACTERS = 4_000_000  # of code or of a Hub data set: a million tokens, more than a comparison reads
# Parts of the standard library's folder that are tests, other people's packages, private twins of a module
# (_pydecimal), or tables that a program wrote.
_NOT_READ = ("test", "idlelib", "site-packages", "dist-packages", "_", "config-", "encodings", "pydoc_data")


@dataclass(frozen=True)
class Text:
    """A text in two parts that share no topic, file or passage.

    Attributes:
        name: what it was asked for as: `prose`, `code`, a path, or `hub:...`.
        calibration: what techniques may learn from.
        evaluation: what they are judged by.
        digest: 16 hexadecimal digits that change with either part.

    Example:
        >>> from foveate.data.text import Text
        >>> Text("mine", calibration="a b c", evaluation="d e f").digest
        '44ea246b33bec5d2'
    """

    name: str
    calibration: str = field(repr=False)
    evaluation: str = field(repr=False)

    @property
    def digest(self) -> str:
        return _hash(f"{self.calibration}\0{self.evaluation}")[:16]


def load_text(name: str = "prose") -> Text:
    """The text of that name, split for good into calibration and evaluation.

    Args:
        name: `prose` (the topics of Python's own help: some 113,000 tokens of technical English), `code` (the
            standard library's sources), the path of a UTF-8 file (its first fifth calibrates), `hub:NAME` or
            `hub:NAME:CONFIG` (the column `text` of a Hub data set: its train split calibrates, its test or
            validation split evaluates; needs the package datasets).

    Raises:
        FoveateError: no such text, an empty or binary file, a data set that can't be had.

    Example:
        >>> from foveate.data.text import load_text
        >>> text = load_text("prose")
        >>> text.name, len(text.evaluation) > 3 * len(text.calibration) > 0
        ('prose', True)
    """
    if name == "prose":
        return _prose()
    if name == "code":
        return _code()
    if name.startswith("hub:"):
        return _hub(name)
    return _file(name)


def tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, length: int | None = None, start: int = 0
) -> torch.LongTensor:
    """The tokens `start` to `start + length` of a text, without special tokens: (1, length), int64.

    Without `length`, all from `start` on. Only as much of the text is read as the answer needs.

    Raises:
        FoveateError: the text has fewer tokens than that.

    Example:
        >>> from foveate.data.text import load_text, tokens
        >>> from foveate.models.load import load
        >>> model, tokenizer = load("smollm2-135m")
        >>> tokens(load_text("prose").evaluation, tokenizer, length=2048).shape
        torch.Size([1, 2048])
    """
    needed = start + (1 if length is None else length)
    # A cut can change the tokens next to it, so some more are read than are used.
    characters = len(text) if length is None else 12 * (needed + 64)
    ids = _encode(text[:characters], tokenizer)
    while len(ids) < needed + 64 and characters < len(text):
        characters *= 2
        ids = _encode(text[:characters], tokenizer)
    if len(ids) < needed:
        raise FoveateError(
            f"the text has {len(ids)} tokens, the task needs {needed}: give a longer text or fewer tokens."
        )
    stop = None if length is None else needed
    return torch.tensor([ids[start:stop]], dtype=torch.long)  # type: ignore[return-value]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: no warning that the text is longer than the model's positions; tasks read it in pieces.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _prose() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FoveateError(
            "this Python comes without pydoc_data, where the text 'prose' lies: give the path of a text file."
        ) from error
    limit = CALIBRATION_SHARE * sum(map(len, topics.values()))
    calibration: set[str] = set()
    size = 0
    for family in sorted(_families(topics), key=lambda keys: _hash(keys[0])):
        family_size = sum(len(topics[key]) for key in family)
        if size + family_size <= limit:
            calibration.update(family)
            size += family_size
    keys = sorted(topics)
    return Text(
        "prose",
        calibration="\n\n".join(topics[key] for key in keys if key in calibration),
        evaluation="\n\n".join(topics[key] for key in keys if key not in calibration),
    )


def _families(topics: dict[str, str]) -> list[list[str]]:
    """The topics, sorted and grouped so that no line of over 40 characters stands in two groups.

    Python's help repeats whole sections: the topic `attribute-access` stands within `specialnames`, too.
    """
    families: list[tuple[list[str], set[str]]] = []
    for key in sorted(topics):
        keys, lines = [key], {line for line in map(str.strip, topics[key].splitlines()) if len(line) > 40}
        related = [family for family in families if family[1] & lines]
        families = [family for family in families if family not in related]
        keys = sorted(keys + [other for family in related for other in family[0]])
        families.append((keys, lines.union(*(family[1] for family in related))))
    return [keys for keys, _ in families]


def _code() -> Text:
    library = Path(sysconfig.get_path("stdlib"))
    tops = [top for top in library.iterdir() if not top.name.startswith(_NOT_READ)]
    paths = [path for top in tops for path in ([top] if top.suffix == ".py" else top.rglob("*.py"))]
    names = [path.relative_to(library) for path in paths if "test" not in path.parent.name]
    # By hash: a spread over the library, in which a file's part does not hang on the other files.
    names.sort(key=lambda name: _hash(name.as_posix()))
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    size = 0
    for name in names:
        source = (library / name).read_text(encoding="utf-8", errors="replace")
        size += len(source)
        if size > MOST_CHARACTERS:
            break
        evaluates = int(_hash(name.as_posix())[-4:], 16) / 2**16 >= CALIBRATION_SHARE
        parts[evaluates][name.as_posix()] = source
    if not all(parts):
        raise FoveateError(
            f"{library} holds no sources, which the text 'code' is made of: give the path of a text file."
        )
    calibration, evaluation = ("\n\n".join(part[name] for name in sorted(part)) for part in parts)
    return Text("code", calibration, evaluation)


def _file(name: str) -> Text:
    path = Path(name).expanduser()
    if not path.exists():
        near = get_close_matches(name, ["prose", "code"], n=1)
        hint = f"did you mean {near[0]}? Else " if near else ""
        raise FoveateError(f"there is no text {name}: {hint}give prose, code, the path of a text file, or hub:NAME.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FoveateError(f"{name} is not UTF-8 text (at byte {error.start}): give a text file.") from error
    except OSError as error:
        raise FoveateError(f"{name} can't be read ({error.strerror}): give a plain text file.") from error
    if "\0" in text:
        raise FoveateError(f"{name} is binary (it holds zero bytes): give a plain text file.")
    return _split(name, text)


def _hub(name: str) -> Text:
    data_set, _, configuration = name.removeprefix("hub:").partition(":")
    try:
        from datasets import load_dataset  # type: ignore[import-untyped, import-not-found]
    except ImportError as error:
        raise FoveateError(f"{name} needs the package datasets: pip install 'foveate[hub]'.") from error
    try:
        splits = load_dataset(data_set, configuration or None, streaming=True)
        judged = next((split for split in ("test", "validation") if split in splits), None)
        if judged and "train" in splits:
            return Text(name, _gather(name, splits["train"]), _gather(name, splits[judged]))
        return _split(name, _gather(name, next(iter(splits.values()))))
    except FoveateError:
        raise
    except Exception as error:  # no network, no such data set, a configuration missing: any type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".:")
        raise FoveateError(
            f"the data set {name} can't be had ({reason}): check its name, its configuration "
            "(hub:NAME:CONFIG) and the network."
        ) from error


def _gather(name: str, rows: Iterable[dict[str, Any]]) -> str:
    """The rows' texts, joined, up to MOST_CHARACTERS; later rows are never fetched."""
    texts: list[str] = []
    size = 0
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise FoveateError(f"{name} has no column text, only {', '.join(row)}: give another data set.")
        texts.append(row["text"])
        size += len(row["text"])
        if size >= MOST_CHARACTERS:
            break
    return "\n\n".join(text for text in texts if text.strip())[:MOST_CHARACTERS]


def _split(name: str, text: str) -> Text:
    """The first fifth calibrates, up to the end of a line where there is one, else of a word."""
    if not text.strip():
        raise FoveateError(f"{name} is empty: give a text.")
    cut = int(CALIBRATION_SHARE * len(text))
    for space in ("\n", " "):
        if (found := text.find(space, cut)) >= 0:
            cut = found + 1
            break
    return Text(name, calibration=text[:cut], evaluation=text[cut:])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
