"""The kernel agrees with its twin in float64, whatever the lengths; and the twin agrees with a softmax."""

import os
import subprocess
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before that

from foveate.errors import FoveateError  # noqa: E402
from foveate.kernels import decode  # noqa: E402
from foveate.kernels.decode import (  # noqa: E402
    Tuning,
    Workspace,
    merge_reference,
    ragged_decode,
    ragged_decode_reference,
    unavailable,
)

DEVICE = "cuda" if CUDA else "cpu"
MISSING = unavailable(DEVICE, torch.float16, 64)
kernel = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
BLOCK = 32
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}  # of the norm; what rounding the weights and out costs

EXACT = 1e-4 if CUDA else 1e-5  # of a score: a rounding of a large logit is one of its weight


def inputs(lengths, *, batch=1, group=4, dim=64, dtype=torch.float16, rooms=None):
    """Query, keys, values, offsets, lengths; slots beyond a region's length hold NaN, which nothing may read."""
    rooms = rooms or lengths
    ends = torch.tensor([0, *rooms]).cumsum(0)
    keys, values = torch.randn(2, ends[-1], dim)
    for start, length, end in zip(ends[:-1], lengths, ends[1:], strict=True):
        keys[start + length : end] = values[start + length : end] = torch.nan
    query = torch.randn(batch, len(lengths) // batch * group, dim)
    tensors = [t.to(DEVICE, dtype) for t in (query, keys * 2, values)]
    return *tensors, ends.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def off(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def compare(tensors, *, programs=5, tuning=None, **options):
    """Two calls of kernel and twin, the scores running on."""
    query, keys, values, offsets, lengths = tensors
    received = torch.rand(keys.shape[0], device=DEVICE)
    exact = received.double()
    tuning = tuning or Tuning(block=BLOCK)
    space = Workspace.allocate(query, keys, offsets, received=True, tuning=tuning, programs=programs)
    options["scaling"] = query.shape[2] ** -0.5
    for forget in (1.0, 0.9):
        for t in (space.maximum, space.total, space.weighted, space.logits):
            t.fill_(torch.nan)
        out = ragged_decode(
            query, keys, values, offsets, lengths, received=received, forget=forget, workspace=space, **options
        )
        q, k, v = (t.double() for t in (query, keys, values))
        want = ragged_decode_reference(q, k, v, offsets, lengths, received=exact, forget=forget, **options)
        assert out.dtype == query.dtype and off(out, want) < TOLERANCE[query.dtype]
        assert torch.allclose(received.double(), exact, atol=EXACT, rtol=EXACT)
        query = query.flip(1)
    return out, received


@kernel
@pytest.mark.parametrize(
    "lengths, rooms, options",
    [
        ([1], None, dict(group=1)),
        ([1, 7], [1, 40], dict(batch=2, group=3, dtype=torch.bfloat16)),
        ([2 * BLOCK, 5 * BLOCK, 70, 7], [2 * BLOCK, 200, 97, 8], dict(batch=2, dim=128, dtype=torch.bfloat16)),
        ([33, 0, 130], [33, 5, 150], dict(batch=3, group=8)),
        ([0, 65], None, dict(group=1, dim=96)),
        ([45, 20], None, dict(group=20, dim=32)),
    ],
)
def test_ragged(lengths, rooms, options):
    compare(inputs(lengths, rooms=rooms, **options))


@kernel
def test_softcap():
    compare(inputs([40, 9], dim=64), softcap=2.0)


@kernel
@pytest.mark.parametrize("programs", [1, 2, 30])
def test_number_of_programs_changes_nothing(programs):
    torch.manual_seed(1)
    compare(inputs([100, 1, 64, 7], batch=2), programs=programs, tuning=Tuning(block=16))


@kernel
def test_all_empty():
    query, keys, values, offsets, lengths = inputs([0, 0], rooms=[4, 9])
    received = torch.ones(13, device=DEVICE)
    out = ragged_decode(query, keys, values, offsets, lengths, scaling=1.0, received=received, forget=0.5)
    assert (out == 0).all() and (received == 1).all()


@kernel
def test_length_beyond_the_region_counts_as_all_of_it():
    query, keys, values, offsets, lengths = inputs([20, 30])
    out = ragged_decode(query, keys, values, offsets, lengths, scaling=0.1)
    assert torch.equal(out, ragged_decode(query, keys, values, offsets, lengths + 1000, scaling=0.1))


def parts(pieces, dtype):
    """A softmax over 90 entries for 4 heads, cut into pieces: maximum, total and weighted of each, and the whole."""
    logits, values = torch.randn(4, 90, dtype=dtype) * 8, torch.randn(90, 64, dtype=dtype)
    whole = (logits * 0.6931471805599453).softmax(-1) @ values
    cut = []
    for start, end in pieces:
        top = logits[:, start:end].amax(-1)
        weights = torch.exp2(logits[:, start:end] - top[:, None])
        cut.append((top, weights.sum(-1), weights @ values[start:end]))
    return *map(torch.stack, zip(*cut, strict=True)), whole


PIECES = [(3, 50), (89, 90), (0, 3), (51, 89), (50, 51)]  # unequal, in no order


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_merge(dtype, tolerance):
    maximum, total, weighted, whole = parts(PIECES, dtype)
    assert off(merge_reference(maximum, total, weighted), whole.double()) < tolerance


@kernel
def test_merge_of_the_kernel():
    maximum, total, weighted, whole = (t.to(DEVICE) for t in parts(PIECES, torch.float32))
    space = Workspace(
        maximum=maximum,
        total=total,
        weighted=weighted,
        starts=torch.tensor([0, 5], dtype=torch.int32, device=DEVICE),  # one region of 5 tiles, one for each program
        logits=torch.empty(0, device=DEVICE),
        programs=5,
        tuning=Tuning(),
    )
    out = torch.empty(1, 4, 64, device=DEVICE)
    offsets, lengths = torch.tensor([0, 90], device=DEVICE), torch.tensor([90], dtype=torch.int32, device=DEVICE)
    decode._finish(out, None, offsets, lengths, space, 1.0)
    assert off(out[0], whole.double()) < 1e-6


def test_twin_is_a_softmax():
    query, keys, values, offsets, lengths = (t.cpu() for t in inputs([9, 4], group=2))
    query, keys, values = query.double(), keys.double(), values.double()
    received = torch.ones(13, dtype=torch.float64)
    out = ragged_decode_reference(
        query, keys, values, offsets, lengths, scaling=0.3, received=received, forget=0.5, softcap=1.5
    )
    k, v = keys[9:], values[9:]
    weights = (1.5 * torch.tanh(query[0, 2:] @ k.T * 0.3 / 1.5)).softmax(-1)
    assert torch.allclose(out[0, 2:], weights @ v)
    assert torch.allclose(received[9:], 0.5 + weights.sum(0))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(query=torch.zeros(1, 3, 64)), "don't fit: query is"),
        (dict(keys=torch.zeros(29, 32)), "don't fit: both are"),
        (dict(offsets=torch.zeros(2)), "one offset more"),
        (dict(values=torch.zeros(29, 64, dtype=torch.float64)), "one dtype"),
        (dict(received=torch.zeros(3)), "does not fit"),
    ],
)
def test_errors_are_sentences(change, sentence):
    names = ("query", "keys", "values", "offsets", "lengths")
    given = dict(zip(names, inputs([20, 9], group=2, dtype=torch.float32), strict=True)) | change
    with pytest.raises(FoveateError, match=sentence):
        ragged_decode_reference(**given, scaling=1.0)
    with pytest.raises(FoveateError, match=sentence):
        ragged_decode(**given, scaling=1.0)


def test_what_the_kernel_can_not_run():
    with pytest.raises(FoveateError, match="ragged_decode_reference runs anywhere"):
        ragged_decode(*inputs([20], dtype=torch.float32), scaling=1.0)
    assert unavailable("cpu", torch.float16, 80) is not None


@kernel
def test_another_calls_workspace():
    query, keys, values, offsets, lengths = inputs([20, 9], group=2)
    space = Workspace.allocate(query, keys, offsets)
    with pytest.raises(FoveateError, match="made for other shapes"):
        ragged_decode(*inputs([20], group=2), scaling=1.0, workspace=space)
    with pytest.raises(FoveateError, match="with received"):
        received = torch.zeros(29, device=DEVICE)
        ragged_decode(query, keys, values, offsets, lengths, scaling=1.0, workspace=space, received=received)


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; from foveate.kernels.decode import unavailable as u; import torch"
    code += "; print(u('cuda', torch.float16, 64))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "not installed" in done.stdout, done.stderr


@pytest.mark.skipif(MISSING is None or decode.triton is None or "FOVEATE_NESTED" in os.environ, reason="they run above")
def test_in_a_process_of_its_own():
    """Triton was imported before this file could ask for the interpreter."""
    env = os.environ | {"TRITON_INTERPRET": "1", "FOVEATE_NESTED": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch, dim, group", [(1, 128, 4), (3, 64, 3), (2, 256, 8), (2, 96, 1)])
def test_long_on_the_device(batch, dim, group, dtype):
    lengths = torch.randint(1, 5000, (batch * 4,)).tolist()
    tensors = inputs(lengths, batch=batch, group=group, dim=dim, dtype=dtype, rooms=[n + 3 for n in lengths])
    compare(tensors, programs=264, tuning=Tuning(block=32 if dim == 256 else 64))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_graph_replays_with_other_lengths():
    query, keys, values, offsets, lengths = inputs([3000, 3000, 3000, 3000], batch=2, dim=128, dtype=torch.bfloat16)
    received = torch.zeros(keys.shape[0], device=DEVICE)
    space = Workspace.allocate(query, keys, offsets, received=True)

    def step():
        return ragged_decode(
            query, keys, values, offsets, lengths, scaling=0.1, received=received, forget=0.9, workspace=space
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    received.zero_()
    exact = received.double()
    for now in ([3000, 1, 64, 7], [5, 2999, 0, 1024], [3000, 3000, 3000, 3000]):
        lengths.copy_(torch.tensor(now))
        out.fill_(torch.nan)
        graph.replay()
        want = ragged_decode_reference(
            *(t.double() for t in (query, keys, values)), offsets, lengths, scaling=0.1, received=exact, forget=0.9
        )
        assert off(out, want) < TOLERANCE[torch.bfloat16]
        assert torch.allclose(received.double(), exact, atol=EXACT, rtol=EXACT)
