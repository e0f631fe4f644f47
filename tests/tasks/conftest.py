"""A bench of a tiny model, for tasks whose figures mean nothing on it but whose workings do."""

from __future__ import annotations

import pytest

from foveate.data.text import load_text
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks import Bench


@pytest.fixture
def bench():
    return Bench(tiny("llama"), tiny_tokenizer(), load_text("prose"))


@pytest.fixture
def smollm2_bench(smollm2):
    return Bench(*smollm2, load_text("prose"))
