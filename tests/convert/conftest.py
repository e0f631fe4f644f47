"""What tests of converted attention share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def in_pieces():
    """A model's logits of ids that are read in three pieces onto one cache, and that cache."""

    def read(model, ids):
        cache, pieces = None, []
        for piece in (ids[:, :20], ids[:, 20:21], ids[:, 21:]):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        return torch.cat(pieces, 1), cache

    return read
