"""What took long to measure on a model is kept on disk, under the model it is of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from foveate.models.source import cache_dir

SAMPLE = 256
"""Numbers of each parameter that tell models apart."""

INTEGERS = (torch.uint8, torch.int8, torch.int16)
"""What quantised weights are kept in."""


def fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that change with the weights: of every parameter its name, shape, and some numbers.

    Quantised weights count too: they are buffers of integers. The numbers are rounded to bfloat16, so that a model has
    one fingerprint in any dtype.
    """
    digest = hashlib.sha256()
    packed = [(name, buffer) for name, buffer in model.named_buffers() if buffer.dtype in INTEGERS]
    for name, parameter in [*model.named_parameters(), *packed]:
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def kin(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that stay the same when layers, heads or channels of a model leave: of its embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    flat = weight.detach().flatten()
    some = flat[:: max(1, flat.numel() // (8 * SAMPLE))][: 8 * SAMPLE].cpu() > 0  # signs are the same in any dtype
    return hashlib.sha256(str(tuple(weight.shape)).encode() + some.numpy().tobytes()).hexdigest()[:16]


def text_digest(ids: Tensor) -> str:
    """16 hexadecimal digits that change with the token ids."""
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]


def stored(model: PreTrainedModel, what: str, version: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors called `what` of a model, on the CPU: from disk, or made and written there.

    Args:
        model: the model.
        what: a short name, for the file.
        version: everything that determines them beside the model.
        make: makes them.
    """
    key = hashlib.sha256(f"{fingerprint(model)} {what} {version}".encode()).hexdigest()[:16]
    path = cache_dir() / "measured" / f"{what}-{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # of several processes that want it, one makes it
        try:
            return load_file(path)
        except FileNotFoundError:
            pass
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)  # a damaged file is made anew
        # Copies: the file's format refuses tensors that share memory.
        made = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in make().items()}
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file(made, part, metadata={"what": what, "version": version})
        os.replace(part, path)
        return made
