"""The recurrence by flash-linear-attention's Triton kernels, where they do the same as the PyTorch form.

The rule, by shapes and dtypes alone (`takes`): CUDA tensors; bfloat16, by their own dtype or by autocast's, as matrix
products have it (float32 and float64 stay in PyTorch, because the kernels would round products to TF32 or bfloat16, and
float16, because they keep memories between chunks in that dtype, where sums overflow); at least `LEAST_TOKENS` tokens
and `LEAST_WORK` multiplications (below that PyTorch is about as quick).
Features and columns are filled up with zeros to a multiple of 16, which changes no number.

In the first use of a kernel for some sizes it is tried on random numbers against the PyTorch form, outputs, memory and
gradients. Where it fails or says something else (Triton has releases that miscompile it), the next one that can do the
same is tried, and in the end the PyTorch form is used, which a line on stderr tells.

`FOVEATE_PLAIN=1` in the environment, or `with plain():`, turns the kernels off.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Form: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""q, k, v, decay, memory to y and memory, as `recurrence` has them."""

LEAST_TOKENS = 128
LEAST_WORK = 2**26
"""Multiplications into the memory: batch * n * heads * feature * columns."""
MULTIPLE = 16
"""Sizes of matrix products in Triton are multiples of that."""
APART = 0.03
"""How far a kernel may be from the PyTorch form on bfloat16 numbers: norm of the difference over the norm."""
APART_DECAY = 0.1
"""The same for the gradient of the decay, a long sum of differences."""
PATIENCE = 2.0
"""Seconds after which a first use is told of."""

_off = os.environ.get("FOVEATE_PLAIN", "0") not in ("", "0")
_chosen: dict[tuple[Any, ...], Form | None] = {}
_told: set[str] = set()


@contextmanager
def plain() -> Iterator[None]:
    """Everything inside uses the PyTorch form.

    Example:
        >>> with plain():
        ...     unavailable()
        'they are turned off (FOVEATE_PLAIN, or plain())'
    """
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def unavailable() -> str | None:
    """Why no kernel is used on this machine, or None where they are."""
    if _off:
        return "they are turned off (FOVEATE_PLAIN, or plain())"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _missing()


@torch.compiler.assume_constant_result
def _missing() -> str | None:
    """What stands in the way, as a constant for the compiler, which would trace into a cached function."""
    return _imported()


@functools.cache
def _imported() -> str | None:
    """What stands in the way of an import, which is tried once, as it takes seconds."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    try:
        import fla.ops.gla
        import fla.ops.simple_gla  # noqa: F401
    except Exception as error:  # whatever it is, there is a PyTorch form
        return f"flash-linear-attention can't be imported ({error})"
    _fewer_choices()
    return None


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels are used for these; see the rule above."""
    if _off or not v.is_cuda:
        return False
    if torch.is_autocast_enabled("cuda"):
        rounded = torch.get_autocast_dtype("cuda") == torch.bfloat16 and v.dtype != torch.float64
    else:
        rounded = q.dtype == k.dtype == v.dtype == torch.bfloat16
    batch, n, heads, feature = k.shape
    enough = n >= LEAST_TOKENS and batch * n * heads * feature * v.shape[-1] >= LEAST_WORK
    return rounded and enough and _missing() is None


@torch.compiler.disable
def run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, memory: Tensor | None, plain_form: Form
) -> tuple[Tensor, Tensor]:
    """The recurrence, by a kernel that says the same as `plain_form`, or by that; the arguments of `recurrence`."""
    if decay is not None and decay.ndim == 1 and decay.requires_grad:
        decay = decay.expand(k.shape[:3])  # the kernels give no gradient to a decay that all tokens share
    kind = 0 if decay is None else decay.ndim
    key = (kind, v.device, k.shape[2], k.shape[3], v.shape[3])
    if key not in _chosen:
        with _patience():
            _chosen[key] = _choose(key, FORMS[kind], plain_form)
    form = _chosen[key]
    return plain_form(q, k, v, decay, memory) if form is None else _filled_up(form, q, k, v, decay, memory)


# ---- the kernels --------------------------------------------------------------------------------------------------


def _by_heads(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """No decay, one a head, or one a token and head."""
    from fla.ops.simple_gla import chunk_simple_gla

    given = {} if decay is None else {"g_gamma" if decay.ndim == 1 else "g": decay}
    return chunk_simple_gla(q, k, v, scale=1.0, initial_state=memory, output_final_state=True, **given)


def _by_channels(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """One a channel, or one a token and head that all channels share."""
    from fla.ops.gla import chunk_gla

    assert decay is not None
    decay = decay if decay.ndim == 4 else decay.unsqueeze(-1).expand(k.shape)
    return chunk_gla(q, k, v, decay, scale=1.0, initial_state=memory, output_final_state=True)


# The gradient of a decay a token and head is refused on Hopper by Triton 3.4 to 3.7, which miscompile it.
FORMS: dict[int, tuple[Form, ...]] = {
    0: (_by_heads,),
    1: (_by_heads,),
    3: (_by_heads, _by_channels),
    4: (_by_channels,),
}
"""Which kernels can do it, best first, by the decay's dimensions (0: none)."""


def _filled_up(
    form: Form, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A kernel in bfloat16, with features and columns filled up with zeros; memory and decay in float32."""
    out_dtype, feature, columns = v.dtype, k.shape[-1], v.shape[-1]
    more, wider = -feature % MULTIPLE, -columns % MULTIPLE
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    decay = None if decay is None else decay.float()
    memory = None if memory is None else memory.float()
    if more:
        q, k = functional.pad(q, (0, more)), functional.pad(k, (0, more))
        if decay is not None and decay.ndim == 4:
            decay = functional.pad(decay, (0, more))
    if wider:
        v = functional.pad(v, (0, wider))
    if memory is not None and (more or wider):
        memory = functional.pad(memory, (0, wider, 0, more))
    y, after = form(q, k, v, decay, memory)
    if more or wider:  # the memory outlives the call, and must not keep more than itself
        y, after = y[..., :columns], after[..., :feature, :columns].contiguous()
    return y.to(out_dtype), after


def _fewer_choices() -> None:
    """Let Triton time fewer variants of each kernel: with all of them a first use takes minutes, not seconds.

    Those with 4 warps and 2 or 3 stages stay, of every tile. What was found best is kept on disk, in Triton's cache
    (TRITON_CACHE_DIR), as flash-linear-attention asks for unless FLA_CACHE_RESULTS=0.
    """
    for name, module in list(sys.modules.items()):
        if not name.startswith("fla.ops."):
            continue
        for part in list(vars(module).values()):
            while part is not None and hasattr(part, "fn"):
                if isinstance(found := getattr(part, "configs", None), list):
                    few = [c for c in found if c.num_warps == 4 and c.num_stages in (2, 3)]
                    part.configs = few or found
                part = part.fn


# ---- the first use ------------------------------------------------------------------------------------------------


@contextmanager
def _patience() -> Iterator[None]:
    """Tell, once a process, that kernels are being compiled and timed, where it takes more than a moment."""

    def tell() -> None:
        _tell("foveate: kernels for linear attention are compiled and timed, once for each size of heads ...")

    waiting = threading.Timer(PATIENCE, tell)
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()


def _tell(words: str) -> None:
    if words not in _told:
        _told.add(words)
        print(words, file=sys.stderr, flush=True)


def _choose(key: tuple[Any, ...], forms: tuple[Form, ...], plain_form: Form) -> Form | None:
    """The first kernel that says what the PyTorch form says."""
    wrong = []
    for form in forms:
        try:
            apart = _apart(key, form, plain_form)
        except Exception as error:  # a compiler's, a driver's, flash-linear-attention's own
            wrong.append(str(error).strip().split("\n")[0] or type(error).__name__)
            continue
        if all(each < (APART_DECAY if name == "decay" else APART) for name, each in apart.items()):
            return form
        worst = max(apart, key=lambda name: apart[name])
        wrong.append(f"{worst} is {apart[worst]:.1%} away from the PyTorch form")
    _tell(f"foveate: a kernel for linear attention can't be used ({'; '.join(wrong)}): PyTorch's operations do it.")
    return None


def _apart(key: tuple[Any, ...], form: Form, plain_form: Form, n: int = 1000) -> dict[str, float]:
    """How far a kernel is from the PyTorch form on random numbers: outputs, memory, and gradients."""
    kind, device, heads, feature, columns = key
    draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    shapes = {
        "q": (1, n, heads, feature),
        "k": (1, n, heads, feature),
        "v": (1, n, heads, columns),
        "memory": (1, heads, feature, columns),
        "decay": {0: (), 1: (heads,), 3: (1, n, heads), 4: (1, n, heads, feature)}[kind],
    }
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        drawn = {name: draw(shape) for name, shape in shapes.items()}
        decay = -0.05 * drawn.pop("decay").abs()  # some hundred tokens are remembered
        weigh_y, weigh_memory = draw(shapes["v"]), draw(shapes["memory"])
        results = []
        for side in (functools.partial(_filled_up, form), plain_form):
            given = {name: x.to(torch.float32 if name == "memory" else torch.bfloat16) for name, x in drawn.items()}
            if kind:
                given["decay"] = decay.clone()
            learned = [name for name in given if name != "decay" or kind > 1]
            for name in learned:
                given[name].requires_grad_()
            y, memory = side(given["q"], given["k"], given["v"], given.get("decay"), given["memory"])
            total = (y.float() * weigh_y).sum() + (memory * weigh_memory).sum()
            gradients = torch.autograd.grad(total, [given[name] for name in learned])
            results.append(
                {"y": y.detach(), "memory after": memory.detach()} | dict(zip(learned, gradients, strict=True))
            )
        ours, theirs = results
        return {
            name: float((ours[name].float() - theirs[name].float()).norm() / theirs[name].float().norm())
            for name in ours
        }
