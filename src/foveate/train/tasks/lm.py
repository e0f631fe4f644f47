"""Language modelling: the next byte, or the next token, of a text."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from foveate.data.text import Text, load_text
from foveate.errors import FoveateError
from foveate.train.tasks.base import Batch, Split, TrainTask, train_task


@train_task("lm")
class LanguageModelling(TrainTask):
    """Passages of a text at random; each position is to say what comes next.

    The text's calibration part is learned, but for its last fifth, which validates; the evaluation part judges. So
    nothing is learned that any task of `foveate compare` evaluates on.

    Fields:
        text: `prose`, `code`, a file, `hub:NAME`, or several joined by `+`.
        length: tokens of a passage.
        unit: `bytes`, or what `foveate.load` takes: that model's tokenizer reads the text.
    """

    about = "the next byte or token of a text"
    better = "loss"
    higher = False

    text: str = "prose+code"
    length: int = 128
    unit: str = "bytes"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise FoveateError(f"{self}: length must be at least 1.")

    @property
    def vocabulary(self) -> int:
        return 256 if self.unit == "bytes" else len(_tokenizer(self.unit))  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        return self.length

    def check(self) -> None:
        for split in ("train", "validation", "test"):
            self._passages(_tokens(self.text, self.unit, split), 1, torch.Generator())

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        return self._passages(_tokens(self.text, self.unit, "train"), count, generator)

    def batch(self, count: int, split: Split, number: int, device: torch.device, seed: int = 0) -> Batch:
        """See `TrainTask.batch`; here the splits are parts of the text."""
        generator = torch.Generator().manual_seed((1_000_003 * seed + number) % 2**63)
        drawn = self._passages(_tokens(self.text, self.unit, split), count, generator)
        return Batch(*(each.to(device, non_blocking=True) for each in drawn))

    def _passages(self, ids: Tensor, count: int, generator: torch.Generator) -> Batch:
        if len(ids) <= self.length:
            raise FoveateError(
                f"{self}: a part of the text has {len(ids)} tokens: give a longer text, or a smaller length."
            )
        starts = torch.randint(len(ids) - self.length, (count, 1), generator=generator)
        rows = ids[starts + torch.arange(self.length + 1)]
        return Batch(rows[:, :-1], rows[:, 1:])


@functools.lru_cache(maxsize=8)
def _tokens(text: str, unit: str, split: Split) -> Tensor:
    texts = [load_text(name) for name in text.split("+")]
    return torch.cat([_encoded(_part(each, split), unit) for each in texts])


def _part(text: Text, split: Split) -> str:
    if split == "test":
        return text.evaluation
    cut = len(text.calibration) * 4 // 5
    return text.calibration[:cut] if split == "train" else text.calibration[cut:]


def _encoded(text: str, unit: str) -> Tensor:
    if unit == "bytes":
        return torch.tensor(list(text.encode("utf-8", errors="replace")), dtype=torch.long)
    return torch.tensor(_tokenizer(unit)(text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[operator]


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str) -> object:
    from foveate.models.load import load

    return load(name, device="cpu")[1]
