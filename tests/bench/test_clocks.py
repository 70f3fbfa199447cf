"""bench/common/clocks.py: who is timed when, what a GPU's clock does, and the memory of a call."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench.common import clocks
from bench.common.statistics import Timing


class CountingClock(clocks.CpuClock):
    """Says that every call takes the time that its result names, and keeps the order."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def sample(self, call, repeats):
        name, seconds = call()
        self.order.append(name)
        return seconds


def test_variants_run_in_turn_and_every_second_round_backwards():
    clock = CountingClock()
    calls = {"a": lambda: ("a", 1.0), "b": lambda: ("b", 2.0), "c": lambda: ("c", 3.0)}
    timings, refused = clocks.interleave(calls, clock, seconds=0.0, min_rounds=4)
    assert refused == {}
    assert "".join(clock.order) == "abc" + "abc" + "cba" + "abc" + "cba"
    assert {name: t.median for name, t in timings.items()} == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert all(t.rounds == 4 and t.spread == 0.0 for t in timings.values())


def test_timing_summarises_samples():
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert timing == Timing(median=3.0, spread=2.0 / 3.0, least=1.0, rounds=5)


class FakeCuda:
    """Records what CudaClock asks of torch.cuda; the k-th pair of events is k ms apart."""

    def __init__(self, log: list[str], capture_error: str | None = None) -> None:
        self.log = log
        self.capture_error = capture_error
        self.pairs = 0

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1024)

    def synchronize(self, device=None):
        self.log.append("synchronize")

    def Event(self, enable_timing):
        assert enable_timing
        return _FakeEvent(self)

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def stream(self, stream):
        return nullcontext()

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextmanager
    def graph(self, graph):
        self.log.append("capture")
        yield
        if self.capture_error:
            raise RuntimeError(self.capture_error)


class _FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self):
        self.cuda.log.append("record")

    def elapsed_time(self, end):
        self.cuda.pairs += 1
        return float(self.cuda.pairs)


def cuda_clock(log: list[str], graph: bool, **options) -> clocks.CudaClock:
    clock = clocks.CudaClock(torch.device("cpu"), graph, FakeCuda(log, **options))
    assert clock._flush.numel() == 4 * 1024  # four times the L2 cache
    clock._flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    return clock


def test_cuda_clock_flushes_before_each_call_and_reads_events_after_one_sync():
    log: list[str] = []
    clock = cuda_clock(log, graph=False)
    call = clock.prepare(lambda: log.append("call"))
    assert clock.sample(call, 3) == pytest.approx(2e-3)  # the median of 1, 2 and 3 ms
    assert log == ["flush", "record", "call", "record"] * 3 + ["synchronize"]


def test_cuda_clock_replays_the_captured_graph():
    log: list[str] = []
    clock = cuda_clock(log, graph=True)
    call = clock.prepare(lambda: log.append("call"))
    assert log == ["call"] * 3 + ["capture", "call"]  # warmed up before the capture
    log.clear()
    clock.sample(call, 1)
    assert log == ["flush", "record", "replay", "record", "synchronize"]


def test_a_call_that_cannot_be_captured_is_named_and_not_timed():
    clock = cuda_clock([], graph=True, capture_error="operation not permitted\ndetails")
    timings, refused = clocks.interleave({"PEFT": lambda: None}, clock, seconds=0.0)
    assert timings == {}
    assert refused == {"PEFT": "cannot be captured in a CUDA graph (operation not permitted)"}


def test_peak_memory_counts_what_lives_at_once():
    def step():
        first = torch.empty(1 << 20, dtype=torch.int8)
        torch.empty(1 << 18, dtype=torch.int8)  # freed at once
        return first, torch.empty(1 << 19, dtype=torch.int8)

    peak = clocks.peak_memory(step, torch.device("cpu"))
    assert peak == (1 << 20) + (1 << 19)
