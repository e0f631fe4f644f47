"""Several processes that train one model, as `torchrun` starts them; one process is the plain case of all of it."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, by the environment that `torchrun` sets; 0 without it.

    Example:
        >>> from foveate.train.processes import rank, world
        >>> rank(), world()
        (0, 1)
    """
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def join(device: torch.device) -> torch.device:
    """Meet the other processes, if there are any; the device that is this process's: of its kind, the local one."""
    if world() == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return device


def from_rank(tensor: Tensor, source: int = 0) -> Tensor:
    """The tensor that process `source` holds; all give one of the same shape and dtype."""
    if world() > 1:
        dist.broadcast(tensor, source)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes."""
    if world() > 1:
        dist.all_reduce(tensor)
        tensor /= world()
    return tensor


def wait() -> None:
    """Until all are here."""
    if world() > 1:
        dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that lies in shards over the processes, put together; any other, as it is. Every process calls it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def like(full: Tensor, shard: Tensor) -> Tensor:
    """A whole tensor laid out as another one lies."""
    if not hasattr(shard, "device_mesh"):
        return full.to(shard.device)
    from torch.distributed.tensor import distribute_tensor

    laid: Tensor = distribute_tensor(full.to(shard.device), shard.device_mesh, shard.placements)  # type: ignore[attr-defined]
    return laid
