"""How the time and the memory of a call are measured.

The variants run in turn, round after round. If the speed of the machine drifts, all of them become
slower together. What is compared are medians over the rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from bench.common.statistics import Timing

Call = Callable[[], object]

# By the value of --clock. Processor time is that of all threads of this process together.
READERS = {"wall": time.perf_counter, "cpu": time.process_time}

MIN_ROUNDS = 5
SAMPLE_SECONDS = 4e-3  # a sample repeats a short call until it lasts this long


class CannotCapture(Exception):
    """The call synchronises with the host, so it cannot become a CUDA graph."""


class Clock(Protocol):
    """A way to time repeated calls on one kind of device."""

    launch: str  # "eager" or "graph"

    def prepare(self, call: Call) -> Call:
        """What to time in place of `call`: the call itself, or its captured graph."""

    def sample(self, call: Call, repeats: int) -> float:
        """Seconds per call."""


class CpuClock:
    """Wall-clock time."""

    launch = "eager"

    def prepare(self, call: Call) -> Call:
        return call

    def sample(self, call: Call, repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats


class CudaClock:
    """CUDA events around each call. The L2 cache holds none of the operands when a call begins.

    With `graph` the call is captured once and replayed, so the host's work is not in the time.
    """

    def __init__(self, device: torch.device, graph: bool, cuda: Any = torch.cuda) -> None:
        self.launch = "graph" if graph else "eager"
        self._graph = graph
        self._cuda = cuda
        # Writing four times the cache's size evicts it, whatever the replacement policy is.
        size = 4 * cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def prepare(self, call: Call) -> Call:
        if not self._graph:
            return call
        side = self._cuda.Stream()
        side.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(side):
            for _ in range(3):  # so that nothing initialises itself during the capture
                call()
        self._cuda.current_stream().wait_stream(side)
        graph = self._cuda.CUDAGraph()
        try:
            with self._cuda.graph(graph):
                call()
        except RuntimeError as error:  # it synchronises: the search for active rows does, for one
            self._cuda.synchronize()
            first = str(error).strip().splitlines()[0]
            raise CannotCapture(f"cannot be captured in a CUDA graph ({first})") from error
        return graph.replay

    def sample(self, call: Call, repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            self._flush.zero_()
            begin = self._cuda.Event(enable_timing=True)
            end = self._cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        self._cuda.synchronize()
        return statistics.median([begin.elapsed_time(end) for begin, end in pairs]) * 1e-3


def interleave(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    sample_seconds: float = SAMPLE_SECONDS,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time all calls in turn for about `seconds`, at least `min_rounds` rounds.

    Every second round runs backwards, so that no call always follows the same neighbour. Returns
    the timings, and for each call that the clock could not prepare the reason.
    """
    ready: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for name, call in calls.items():
        try:
            ready[name] = clock.prepare(call)
        except CannotCapture as error:
            refused[name] = str(error)
    repeats = {}
    for name, call in ready.items():
        once = clock.sample(call, 1)  # warms up
        if once < sample_seconds:
            once = clock.sample(call, 1)
        repeats[name] = max(1, round(sample_seconds / max(once, 1e-9)))
        if repeats[name] > 1:
            clock.sample(call, repeats[name])
    samples: dict[str, list[float]] = {name: [] for name in ready}
    begin = time.perf_counter()
    done = 0
    while done < min_rounds or time.perf_counter() - begin < seconds:
        for name in list(ready) if done % 2 == 0 else reversed(list(ready)):
            samples[name].append(clock.sample(ready[name], repeats[name]))
        done += 1
    return {name: Timing.of(values) for name, values in samples.items()}, refused


def peak_memory(call: Call, device: torch.device) -> int:
    """The most bytes that one call held at once, beyond what was allocated before it."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    # The CPU allocator keeps no statistics, but it reports each allocation to the profiler. The
    # profiler's own log lines would appear in the table, so they are turned off.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = call()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak
