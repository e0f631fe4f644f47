"""The recurrence against its definition, and when kernels do it."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from foveate.backbone import fast
from foveate.backbone import recurrence as module
from foveate.backbone.recurrence import recurrence, recurrence_by_steps, recurrence_in_pytorch
from foveate.measure.clock import peak_bytes

KINDS = [0, 1, 3, 4]  # dimensions of the decay


def given(kind, n, heads=3, feature=5, columns=7, batch=2, dtype=torch.float64, strength=1.0):
    draw = torch.Generator().manual_seed(n)

    def randn(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype)

    shape = {0: None, 1: (heads,), 3: (batch, n, heads), 4: (batch, n, heads, feature)}[kind]
    q, k, v = (randn(batch, n, heads, size) for size in (feature, feature, columns))
    return q, k, v, None if shape is None else -strength * randn(*shape).abs(), randn(batch, heads, feature, columns)


def results(form, inputs):
    """Outputs, memory, and the gradients of all inputs."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    y, memory = form(*leaves)
    weigh = [torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape).cos() for x in (y, memory)]
    total = (y * weigh[0]).sum() + (memory * weigh[1]).sum()
    return [y, memory, *torch.autograd.grad(total, [x for x in leaves if x is not None])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 8, 64, 65, 147, 1100])
def test_chunks_are_steps(kind, n):
    inputs = given(kind, n, columns=4)
    for ours, theirs in zip(results(recurrence, inputs), results(recurrence_by_steps, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_groups_of_chunks_are_steps(kind, monkeypatch):
    monkeypatch.setattr(module, "GROUP", 2)
    monkeypatch.setattr(module, "CHUNK", 4)
    inputs = given(kind, 150)
    for ours, theirs in zip(results(recurrence, inputs), results(recurrence_by_steps, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_decays_that_leave_nothing_stay_finite(kind):
    inputs = given(kind, 200, dtype=torch.float32, strength=60.0)
    assert all(each.isfinite().all() for each in results(recurrence, inputs))
    torch.testing.assert_close(recurrence(*inputs)[0], recurrence_by_steps(*inputs)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_linear_in_the_length(kind):
    def peak(n):
        q, k, v, decay, _ = given(kind, n, batch=1, dtype=torch.float32)
        q.requires_grad_()
        return peak_bytes(lambda: recurrence(q, k, v, decay)[0].sum().backward(), torch.device("cpu"))[0]

    assert 1.8 < peak(16384) / peak(8192) < 2.2


def test_sums_are_exact_in_bfloat16_and_under_autocast():
    q, k, v, decay, memory = given(3, 100, dtype=torch.float32)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    exact, last = recurrence_by_steps(*(x.double() for x in (q, k, v, decay, memory)))
    with torch.autocast("cpu", torch.bfloat16):
        y, after = recurrence(q, k, v, decay, memory)
    assert y.dtype == torch.bfloat16 and after.dtype == torch.float32
    torch.testing.assert_close(after, last.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y.double(), exact, atol=1e-2, rtol=1e-2)


# ---- the kernels' rule, and what happens around them: a stand-in for flash-linear-attention, on a CPU ---------------


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def there(monkeypatch):
    monkeypatch.setattr(fast, "_missing", lambda: None)
    monkeypatch.setattr(fast, "_off", False)
    monkeypatch.setattr(fast, "_chosen", {})
    monkeypatch.setattr(fast, "_told", set())


def sizes(n=2048, heads=8, feature=128, columns=128, batch=1, dtype=torch.bfloat16, cuda=True):
    made = [torch.empty(batch, n, heads, size, dtype=dtype, device="meta") for size in (feature, feature, columns)]
    return [x.as_subclass(OnCuda) for x in made] if cuda else made


def test_the_rule(there):
    assert fast.takes(*sizes())
    assert fast.takes(*sizes(feature=273, columns=65))
    assert not fast.takes(*sizes(cuda=False))
    assert not fast.takes(*sizes(dtype=torch.float32)) and not fast.takes(*sizes(dtype=torch.float64))
    assert not fast.takes(*sizes(dtype=torch.float16))
    assert not fast.takes(*sizes(n=64, batch=64)) and not fast.takes(*sizes(n=1, batch=4096))
    assert not fast.takes(*sizes(n=256, batch=32, heads=4, feature=16, columns=16))  # a claim's small model
    q, k, v = sizes()
    assert not fast.takes(q.float().as_subclass(OnCuda), k, v)


def test_autocast_decides_for_float32_and_never_for_float64(there, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert fast.takes(*sizes(dtype=torch.float32)) and not fast.takes(*sizes(dtype=torch.float64))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    assert not fast.takes(*sizes(dtype=torch.float32))


def test_they_can_be_turned_off(there):
    with fast.plain():
        assert not fast.takes(*sizes())
        assert "turned off" in fast.unavailable()
    assert fast.takes(*sizes())


def test_the_environment_turns_them_off(monkeypatch):
    monkeypatch.setenv("FOVEATE_PLAIN", "1")
    importlib.reload(fast)
    assert "turned off" in fast.unavailable()
    monkeypatch.setenv("FOVEATE_PLAIN", "0")
    importlib.reload(fast)
    assert "turned off" not in (fast.unavailable() or "")


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fast.importlib.util, "find_spec", lambda name: None)
    fast._imported.cache_clear()
    assert fast.unavailable() == "flash-linear-attention is not installed"
    monkeypatch.setattr(fast.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "fla", None)
    fast._imported.cache_clear()
    assert "can't be imported" in fast.unavailable()
    fast._imported.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_that_fill_up_change_nothing(kind, there, monkeypatch, capsys):
    seen = []

    def kernel(q, k, v, decay, memory):
        seen.append((q.dtype, q.shape[-1], v.shape[-1]))
        assert decay is None or decay.dtype == torch.float32
        return recurrence_in_pytorch(q, k, v, decay, memory)

    monkeypatch.setitem(fast.FORMS, kind, (kernel,))
    inputs = [None if x is None else x.float() for x in given(kind, 40)]
    y, memory = fast.run(*inputs, recurrence_in_pytorch)
    assert set(seen) == {(torch.bfloat16, 16, 16)}  # from 5 and 7
    exact = recurrence(*inputs)
    assert y.dtype == torch.float32 and memory.shape == exact[1].shape
    assert memory.untyped_storage().nbytes() == memory.numel() * 4
    assert (y - exact[0]).norm() < 0.01 * exact[0].norm()
    assert (memory - exact[1]).norm() < 0.01 * exact[1].norm()
    assert capsys.readouterr().err == ""


def test_a_kernel_that_errs_is_not_used(there, monkeypatch, capsys):
    calls = []

    def raises(*inputs):
        raise RuntimeError("Triton miscompiles it\nand more")

    def wrong(q, k, v, decay, memory):
        y, memory = recurrence_in_pytorch(q, k, v, decay, memory)
        return y * torch.linspace(0.9, 1.0, y.shape[1])[:, None, None], memory

    def right(*inputs):
        calls.append(inputs)
        return recurrence_in_pytorch(*inputs)

    inputs = given(3, 40, dtype=torch.float32)
    monkeypatch.setitem(fast.FORMS, 3, (raises, wrong, right))
    fast.run(*inputs, recurrence_in_pytorch)
    assert len(calls) == 2 and capsys.readouterr().err == ""  # the trial, and the call
    monkeypatch.setattr(fast, "_chosen", {})
    monkeypatch.setitem(fast.FORMS, 3, (raises, wrong))
    for _ in range(2):
        y, _ = fast.run(*inputs, recurrence_in_pytorch)
        assert torch.equal(y, recurrence(*inputs)[0])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Triton miscompiles it; " in said and "away from the PyTorch form" in said


def test_the_trial_leaves_the_generators_as_they_were(there, monkeypatch):
    monkeypatch.setitem(fast.FORMS, 0, (recurrence_in_pytorch,))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode():
        fast.run(*given(0, 40, dtype=torch.float32), recurrence_in_pytorch)
    assert torch.equal(before, torch.get_rng_state()) and list(fast._chosen.values()) == [recurrence_in_pytorch]


def test_a_learned_decay_of_all_tokens_gets_its_gradient(there, monkeypatch):
    def without(q, k, v, decay, memory):  # as a kernel that has no gradient for it
        return recurrence_in_pytorch(q, k, v, decay.detach(), memory)

    monkeypatch.setitem(fast.FORMS, 1, (without,))
    monkeypatch.setitem(fast.FORMS, 3, (recurrence_in_pytorch,))
    q, k, v, decay, memory = given(1, 30, dtype=torch.float32)
    decay.requires_grad_()
    fast.run(q, k, v, decay, memory, recurrence_in_pytorch)[0].sum().backward()
    assert decay.grad.abs().min() > 0


def test_a_slow_first_use_is_told_once(there, monkeypatch, capsys):
    monkeypatch.setattr(fast, "PATIENCE", 0.01)

    def slow(*inputs):
        __import__("time").sleep(0.1)
        return recurrence_in_pytorch(*inputs)

    monkeypatch.setitem(fast.FORMS, 0, (slow,))
    for heads in (2, 3):
        fast.run(*given(0, 20, heads=heads, dtype=torch.float32), recurrence_in_pytorch)
    assert capsys.readouterr().err.count("compiled and timed") == 1


def test_fewer_variants_are_timed(monkeypatch):
    def kernel():
        pass

    choices = [types.SimpleNamespace(num_warps=w, num_stages=s) for w in (1, 2, 4, 8) for s in (2, 3, 4)]
    tuner = types.SimpleNamespace(fn=types.SimpleNamespace(fn=kernel), configs=choices)
    other = types.SimpleNamespace(fn=kernel, configs=choices[:1])
    loaded = types.SimpleNamespace(a=types.SimpleNamespace(fn=tuner), b=other, c=1)
    monkeypatch.setitem(sys.modules, "fla.ops.made_up", loaded)
    fast._fewer_choices()
    assert [(c.num_warps, c.num_stages) for c in tuner.configs] == [(4, 2), (4, 3)]
    assert other.configs == choices[:1]


def test_compiled_it_is_the_same():
    inputs = given(3, 40)
    compiled = torch.compile(recurrence, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs)[0], recurrence(*inputs)[0])


def test_whether_kernels_are_there_is_a_constant_for_the_compiler():
    def either(x):
        return x + 1 if fast._missing() is None else x - 1

    compiled = torch.compile(either, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(1)), either(torch.zeros(1)))


def test_kernels_break_the_graph_and_nothing_else(there, monkeypatch):
    monkeypatch.setattr(fast, "takes", lambda q, k, v: True)
    monkeypatch.setitem(fast.FORMS, 3, (recurrence_in_pytorch,))
    inputs = given(3, 40, dtype=torch.float32)
    y, _ = torch.compile(lambda *x: recurrence(*x), backend="eager")(*inputs)
    assert (y - recurrence_in_pytorch(*inputs)[0]).norm() < 0.01 * y.norm()


@pytest.mark.skipif(fast.unavailable() is not None, reason=f"no kernels here: {fast.unavailable()}")
@pytest.mark.parametrize("sizes", [(64, 64), (128, 65)])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_a_gpu_agree(kind, sizes, capsys):
    feature, columns = sizes
    inputs = given(kind, 1500, heads=12, feature=feature, columns=columns, dtype=torch.float32, strength=0.05)
    inputs = [None if x is None else x.cuda() for x in inputs]
    inputs[:3] = [x.bfloat16() for x in inputs[:3]]
    assert fast.takes(*inputs[:3])
    (y, memory), (exact, last) = recurrence(*inputs), recurrence_in_pytorch(*inputs)
    assert "can't be used" not in capsys.readouterr().err
    assert (y.float() - exact.float()).norm() < 0.02 * exact.float().norm()
    assert (memory - last).norm() < 0.02 * last.norm() and memory.dtype == torch.float32
