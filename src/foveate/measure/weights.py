"""What a model's weights really weigh."""

from __future__ import annotations

from torch import nn


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all that would be saved of a model: parameters and buffers, what is shared counted once.

    Example:
        >>> from torch import nn
        >>> weight_bytes(nn.Linear(8, 4))
        144
    """
    storages = {}
    for tensor in model.state_dict().values():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
