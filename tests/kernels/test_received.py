"""The kernel of received attention against its plain twin in float64: under Triton's interpreter, or on a CUDA card."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

triton = pytest.importorskip("triton")

from foveate.errors import FoveateError  # noqa: E402
from foveate.kernels import received as module  # noqa: E402
from foveate.kernels.received import (  # noqa: E402
    Config,
    attend_and_receive,
    attend_and_receive_reference,
    available,
    received_mass,
)

DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = module.INTERPRETED
HOPPER = CUDA and torch.cuda.get_device_capability() >= (9, 0)

needs_kernel = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="Triton was imported without its interpreter")
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a card of compute capability 9.0")


def inputs(batch, heads, kv_heads, new, entries, dim, dtype, *, device=DEVICE):
    """Queries laid out as a model's projection gives them, (batch, new, head, head_dim) transposed, and keys, values.

    Queries and keys are of the size that makes attention pick: a few entries get most of each query's weight.
    """
    query = 1.5 * torch.randn(batch, new, heads, dim, device=device)
    key, value = (
        1.5 * torch.randn(batch, kv_heads, entries, dim, device=device),
        torch.randn(batch, kv_heads, entries, dim, device=device),
    )
    return query.to(dtype).transpose(1, 2), key.to(dtype), value.to(dtype)


def error(ours, exact):
    """Norm of the difference over norm; NaN where anything is NaN."""
    return ((ours.double() - exact).norm() / exact.norm()).item()


def brute(query, key, value, *, scaling, forget=1.0, last=None):
    """The definition, with the whole matrix, in float64."""
    q, k, v = query.double(), key.double(), value.double()
    group, new, entries = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    logits = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    seen = torch.ones(new, entries, dtype=torch.bool, device=q.device).tril(entries - new)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    age = torch.arange(new - 1, -1, -1, device=q.device)
    factor = forget ** age.double() * (age < (last or new))
    mass = (weights * factor[:, None]).sum(2).unflatten(1, (k.shape[1], group)).sum(2)
    return weights @ v.repeat_interleave(group, 1), mass


SHAPES = [  # batch, heads, kv_heads, new, entries, dim
    (1, 1, 1, 1, 1, 64),
    (2, 3, 3, 7, 7, 64),
    (1, 6, 2, 130, 130, 64),
    (1, 4, 1, 130, 130, 128),
    (2, 4, 1, 7, 130, 64),
    (1, 3, 1, 1, 130, 128),
    (1, 2, 2, 100, 259, 64),
]
COUNTS = [(1.0, None), (0.9, None), (1.0, 4), (0.9, 4)]


@pytest.mark.parametrize(("forget", "last"), COUNTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twin_is_the_definition(shape, forget, last):
    query, key, value = inputs(*shape, torch.float64, device="cpu")
    given = {"scaling": shape[-1] ** -0.5, "forget": forget, "last": last}
    for ours, exact in zip(
        attend_and_receive_reference(query, key, value, **given), brute(query, key, value, **given), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_twin_in_blocks(monkeypatch):
    query, key, value = inputs(2, 4, 2, 9, 17, 8, torch.float64, device="cpu")
    whole = attend_and_receive_reference(query, key, value, scaling=0.3, forget=0.8, last=5)
    monkeypatch.setattr(module, "BLOCK", 300)  # 2 queries a block
    for ours, exact in zip(
        attend_and_receive_reference(query, key, value, scaling=0.3, forget=0.8, last=5), whole, strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@needs_kernel
@pytest.mark.parametrize(
    ("dtype", "forget", "last"),
    [(torch.bfloat16, *COUNTS[0]), (torch.bfloat16, *COUNTS[3]), *((torch.float16, *count) for count in COUNTS)],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_agrees_with_twin(shape, forget, last, dtype):
    query, key, value = inputs(*shape, dtype)
    given = {"scaling": shape[-1] ** -0.5, "forget": forget, "last": last}
    assert available(query)
    out, received = attend_and_receive(query, key, value, **given)
    exact_out, exact = attend_and_receive_reference(query.double(), key.double(), value.double(), **given)
    assert out.dtype == dtype and received.dtype == torch.float32
    assert error(received, exact) < 1e-4
    assert error(out, exact_out) < 4e-3  # its own rounding, once for the past and once for the new ones


CUTS = [
    Config(32, 64, keys_first=True),
    Config(32, 64, tma=True),
    Config(64, 32),
    Config(64, 64, keys_first=True, tma=True),
]


@needs_kernel
@pytest.mark.skipif(CUDA and not HOPPER, reason="bulk tensor copies need compute capability 9.0")
@pytest.mark.parametrize("config", CUTS, ids=str)
def test_every_cut_gives_the_same(config, monkeypatch):
    monkeypatch.setattr(module, "_config", lambda *args: config)
    query, key, value = inputs(2, 4, 2, 70, 201, 64, torch.float16)
    exact = attend_and_receive_reference(query.double(), key.double(), value.double(), scaling=0.125, forget=0.97)[1]
    assert error(attend_and_receive(query, key, value, scaling=0.125, forget=0.97)[1], exact) < 1e-4


@needs_kernel
def test_strides_do_not_matter():
    query, key, value = inputs(1, 4, 2, 40, 40, 64, torch.float16)
    plain = attend_and_receive(query.contiguous(), key, value, scaling=0.125)[1]
    wide = torch.randn(1, 2, 40, 3 * 64, device=DEVICE, dtype=torch.float16)  # as a fused projection gives keys
    wide[..., 64:128] = key
    odd = query.transpose(-1, -2).contiguous().transpose(-1, -2)  # head_dim is not the last in memory
    for q, k in ((query, wide[..., 64:128]), (odd, key)):
        assert error(attend_and_receive(q, k, value, scaling=0.125)[1], plain.double()) < 1e-5


@needs_kernel
def test_equal_logits_give_harmonic_sums():
    zeros = torch.zeros(1, 2, 150, 64, dtype=torch.float16, device=DEVICE)
    received = attend_and_receive(zeros, zeros[:, :1], zeros[:, :1], scaling=1.0)[1]
    shares = 1 / torch.arange(1, 151, device=DEVICE)
    torch.testing.assert_close(received[0, 0], 2 * shares.flip(0).cumsum(0).flip(0), rtol=1e-5, atol=0)


@needs_kernel
def test_mass_alone_and_its_sum():
    query, key, value = inputs(1, 4, 2, 33, 77, 64, torch.float16)
    lse = module._attend(query, key, value, 0.125)[1]
    received = received_mass(query, key, lse, scaling=0.125)
    torch.testing.assert_close(received.sum(-1), torch.full((1, 2), 2 * 33.0, device=DEVICE), rtol=1e-4, atol=0)


def test_other_tensors_take_the_twin():
    query, key, value = inputs(1, 2, 1, 3, 5, 20, torch.float32, device="cpu")
    assert not available(query)
    out, received = attend_and_receive(query, key, value, scaling=0.2)
    exact_out, exact = attend_and_receive_reference(query, key, value, scaling=0.2)
    assert torch.equal(out, exact_out) and torch.equal(received, exact)


def test_gradient_reaches_the_output_only():
    query, key, value = (x.requires_grad_() for x in inputs(1, 2, 1, 3, 5, 8, torch.float32, device="cpu"))
    out, received = attend_and_receive(query, key, value, scaling=0.2)
    assert out.requires_grad and not received.requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"forget": 0.0}, "above 0 and at most 1"),
        ({"forget": 1.1}, "above 0 and at most 1"),
        ({"last": 0}, "give 1 or more"),
        ({"query": torch.zeros(1, 3, 2, 64)}, "multiple of the KV heads"),
        ({"query": torch.zeros(1, 2, 9, 64)}, "can't be the last"),
        ({"query": torch.zeros(2, 2, 64)}, "don't fit"),
        ({"value": torch.zeros(1, 2, 5, 32)}, "give the same"),
    ],
)
def test_refuses_what_has_no_meaning(change, words):
    x = torch.zeros(1, 2, 5, 64)
    given = {"query": x, "key": x, "value": x, "scaling": 1.0} | change
    for function in (attend_and_receive, attend_and_receive_reference):
        with pytest.raises(FoveateError, match=words):
            function(**given)


def test_mass_alone_refuses():
    x = torch.zeros(1, 2, 5, 64)
    with pytest.raises(FoveateError, match="attend_and_receive_reference"):
        received_mass(x, x, torch.zeros(1, 2, 5), scaling=1.0)
    if CUDA or INTERPRETED:
        half = x.half().to(DEVICE)
        with pytest.raises(FoveateError, match="one a query"):
            received_mass(half, half, torch.zeros(1, 2, 4, device=DEVICE), scaling=1.0)


@pytest.mark.skipif(CUDA or INTERPRETED or "FOVEATE_NESTED" in os.environ, reason="the tests above ran the kernel")
def test_in_a_process_of_its_own():
    """Triton was imported before this file could ask for its interpreter."""
    env = os.environ | {"TRITON_INTERPRET": "1", "FOVEATE_NESTED": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_hopper
@pytest.mark.parametrize("config", module.CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("length", "new", "dim", "dtype"),
    [
        (1000, 1000, 128, torch.bfloat16),
        (1000, 700, 64, torch.float16),
        (4096, 4096, 128, torch.bfloat16),
        (4096, 3797, 128, torch.bfloat16),
    ],
)
def test_every_config_on_hopper(length, new, dim, dtype, config, monkeypatch):
    monkeypatch.setattr(module, "_config", lambda *args: config)
    query, key, value = inputs(1, 8, 2, new, length, dim, dtype)
    for forget in (1.0, 0.999):
        given = {"scaling": dim**-0.5, "forget": forget}
        out, received = attend_and_receive(query, key, value, **given)
        exact_out, exact = attend_and_receive_reference(query.double(), key.double(), value.double(), **given)
        assert error(received, exact) < 1e-3
        assert error(out, exact_out) < 5e-3


@needs_hopper
@pytest.mark.parametrize(("new", "last"), [(4096, 32), (1, None), (33, None), (100, 64)])
def test_few_queries_on_hopper(new, last):
    query, key, value = inputs(2, 8, 2, new, 4096, 128, torch.bfloat16)
    given = {"scaling": 128**-0.5, "last": last}
    out, received = attend_and_receive(query, key, value, **given)
    exact_out, exact = attend_and_receive_reference(query.double(), key.double(), value.double(), **given)
    assert error(received, exact) < 1e-3
    assert error(out, exact_out) < 5e-3


@needs_hopper
def test_choice_is_measured_once():
    query, key, value = inputs(1, 8, 2, 4096, 4096, 128, torch.bfloat16)
    module._best.clear()
    attend_and_receive(query, key, value, scaling=0.088)
    attend_and_receive(query, key, value, scaling=0.088)
    assert len(module._best) == 1
