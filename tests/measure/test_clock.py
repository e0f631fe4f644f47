from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from foveate.measure.clock import alternated, peak_bytes, timed

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here"
))]  # fmt: skip


def test_timed_gives_wall_time_and_the_result():
    seconds, result = timed(lambda: time.sleep(0.02) or "done", CPU)
    assert 0.02 <= seconds < 1 and result == "done"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_timed_waits_for_the_gpu():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)

    def work(count):
        for _ in range(count):
            x @ x

    work(1)
    few, many = timed(lambda: work(5), device)[0], timed(lambda: work(50), device)[0]
    assert 5 < many / few < 20


def test_sides_take_turns_and_change_places():
    ran: list[str] = []
    sides = [lambda name=name: ran.append(name) or len(ran) for name in "ab"]
    fractions: list[float] = []
    results = alternated(sides, 3, fractions.append)
    assert "".join(ran) == "ba" + "ab" + "ba" + "ab"  # the first round warms up
    assert results == [[3, 6, 7], [4, 5, 8]]
    assert fractions == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("device", DEVICES)
def test_peak_counts_what_lives_at_one_time(device):
    old = torch.ones(1 << 20, device=device)

    def work():
        a = old + 1  # 4 MiB
        b = a * 2  # 8 MiB
        del a
        c = b[1:].view(-1).half()  # 6 MiB: a view is nothing new
        del b
        return c + 1

    peak, result = peak_bytes(work, device)
    assert peak == pytest.approx(8 * 2**20, rel=0.01) and result.numel() == (1 << 20) - 1


def test_peak_leaves_out_weights_that_were_there():
    layer = nn.Linear(1000, 1000)
    with torch.no_grad():
        peak, _ = peak_bytes(lambda: layer(torch.ones(1, 1000)), CPU)
    assert 8000 <= peak < 20_000


def test_peak_agrees_with_the_allocator(smollm2):
    """Against PyTorch's profiler, which hears every allocation but also prints to stderr."""
    model, _ = smollm2
    ids = torch.arange(1, 65).unsqueeze(0)

    @torch.no_grad()
    def work():
        model(ids, use_cache=True)

    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert peak_bytes(work, CPU)[0] == pytest.approx(most, rel=0.02)
