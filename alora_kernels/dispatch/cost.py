"""The cost model that ranks strategies on a GPU: a pure function of the problem and the schedule.

Time of a launch = fixed cost + max(bytes / bandwidth, arithmetic). The arithmetic of a GEMM takes
whole waves of its tiles, with one tile on a multiprocessor at a time. If there are too few blocks
to keep the memory busy, they get only their share of the bandwidth. The time of a strategy is the
sum over its launches.

The rates come from data sheets. The efficiencies say how near a GEMM comes to these rates. They are
estimates until `bench/run.py --tune` has measured this GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..contract import Problem, Schedule
from ..hardware import OLD_INSTRUCTIONS, Rates, rates_of

VENDOR_EFFICIENCY = 0.75  # rate of a large GEMM of the vendor's library / data-sheet rate
OUR_EFFICIENCY = 0.85  # rate of our GEMM / rate of the vendor's, until measured
LAUNCH = 2.5e-6  # seconds between the starts of two short kernels on one stream
NARROW_TILE = 16  # tensor cores multiply at least 16 columns, so a smaller R costs as much as 16
L2_SHARE = 0.55  # time to read a byte again from L2 / time to read it from device memory
STREAMS = 2  # a multiprocessor can use up to this many times its share of the bandwidth
VENDOR_TILES = ((128, 256), (128, 128), (64, 128), (16, 64))  # the library takes the fastest
PARTS = 2  # float32 parts of dA or dB per multiprocessor, each written and read once


TILES = (
    *[Schedule("gemm", m, n) for m, n in VENDOR_TILES[:3]],
    Schedule("decode", 16, 64, splits=4),
)


class Launch(NamedTuple):
    """One launch of a strategy, as the model estimates it."""

    what: str
    bytes: float
    flops: float
    seconds: float


def seconds(
    problem: Problem,
    strategy: str,
    schedules: Sequence[Schedule] | None = None,
    rates: Rates | None = None,
    efficiency: float = OUR_EFFICIENCY,
) -> float:
    """Estimated time in seconds of the forward or backward pass of `problem` with `strategy`."""
    return sum(
        [launch.seconds for launch in launches(problem, strategy, schedules, rates, efficiency)]
    )


def launches(
    problem: Problem,
    strategy: str,
    schedules: Sequence[Schedule] | None = None,
    rates: Rates | None = None,
    efficiency: float = OUR_EFFICIENCY,
) -> list[Launch]:
    """The launches of the whole pass: base and adapter, or in backward dx, dA and dB.

    `schedules` has one schedule per projection; by default the fastest of `TILES` is assumed.
    `efficiency` is the rate of our GEMM relative to the vendor's.
    """
    rates = rates or rates_of(problem.arch)
    active, size = problem.active, problem.dtype.itemsize
    ranks = [-(-rank // NARROW_TILE) * NARROW_TILE for rank in problem.ranks]
    fused = strategy != "delta" and not problem.base_given
    found: list[Launch] = []
    inside = False
    shrinks: list[tuple[int, int]] = []  # bytes except those of x, and x's columns
    for i, (width, rank) in enumerate(zip(problem.out_features, ranks)):
        left, right = (width, problem.in_features) if problem.backward else (
            problem.in_features, width)  # fmt: skip
        if fused:
            choice = TILES if schedules is None else (schedules[i],)
            gemms = [
                _fused(problem, rates, c, strategy, left, right, rank, efficiency) for c in choice
            ]
            best = min(range(len(choice)), key=lambda j: gemms[j].seconds)
            found.append(gemms[best])
            inside = choice[best].kernel == "fused"
            if choice[best].kernel == "gemm" and choice[best].splits > 1:
                parts = 8.0 * choice[best].splits * problem.rows * right
                found.append(_stream("reduce", rates, parts))
        elif not problem.base_given:
            found.append(_vendor(problem, rates, left, right))
        if not fused or (strategy == "tail" and not inside):
            own = size * (active * rank + rank * left)
            if problem.backward:
                found.append(_stream("shrink", rates, own + size * active * left))
            else:  # forward: one launch for all projections reads x once
                shrinks.append((own, left))
        if not fused:
            moved = size * (active * (2 * right + rank) + rank * right)
            found.append(_stream("expand_add", rates, moved))
        if problem.backward:
            for what, wide in (("grad_b", left), ("grad_a", right)):
                found.append(_stream(what, rates, size * active * (wide + rank)))
                splits = min(PARTS * rates.sms // max(1, -(-wide // 128)), -(-active // 128))
                found.append(_stream("reduce", rates, 8.0 * max(splits, 1) * wide * rank))
    if shrinks:
        moved = sum([own for own, _ in shrinks]) + size * active * shrinks[0][1]
        found.insert(0, _stream("shrink", rates, moved))
    return found


def base_seconds(problem: Problem, rates: Rates | None = None) -> float:
    """Estimated time in seconds of the frozen layers alone, by the vendor's library."""
    rates = rates or rates_of(problem.arch)
    total = 0.0
    for width in problem.out_features:
        left, right = (width, problem.in_features) if problem.backward else (
            problem.in_features, width)  # fmt: skip
        total += _vendor(problem, rates, left, right).seconds
    return total


def _vendor(problem: Problem, rates: Rates, left: int, right: int) -> Launch:
    """The base computed by the vendor's library."""
    rows, size = problem.rows, problem.dtype.itemsize
    moved = float(size * (rows * (left + right) + left * right))
    speed = _peak(problem, rates) * VENDOR_EFFICIENCY
    times = [
        _waves(rates, rows, right, tile) * 2.0 * tile[0] * tile[1] * left / (speed / rates.sms)
        for tile in VENDOR_TILES
    ]
    arithmetic = max(min(times), 2.0 * rows * left * right / speed)
    total = LAUNCH + max(moved / rates.bandwidth, arithmetic)
    return Launch("gemm of the vendor", moved, 2.0 * rows * left * right, total)


def _fused(
    problem: Problem, rates: Rates, schedule: Schedule, strategy: str, left: int, right: int,
    rank: int, efficiency: float,
) -> Launch:  # fmt: skip
    """The GEMM of the base with the strategy's part inside."""
    rows, active, size = problem.rows, problem.active, problem.dtype.itemsize
    fraction = active / rows if rows else 0.0
    tile = (schedule.rows, schedule.columns)
    column_tiles = -(-right // schedule.columns)
    moved = float(size * (rows * (left + right) + left * right))
    depth = float(left)  # K of one tile, with the extra depth that the strategy adds
    flops = 2.0 * rows * left * right
    again = 0.0  # bytes from L2 whose time is not hidden
    if strategy == "onepass":
        # Every column tile computes the narrow product of its rows again.
        depth += fraction * (left * rank / schedule.columns + rank)
        moved += size * rank * (left + right)
        flops += 2.0 * active * rank * (left * column_tiles + right)
        if rows <= 16:
            # Every column tile reads lora_a from L2, besides its part of the weight.
            again = L2_SHARE * size * rank * left * column_tiles
    else:
        depth += fraction * rank
        moved += size * rank * (active + right)
        flops += 2.0 * active * rank * right
        if schedule.kernel == "fused":
            # The narrow tiles, 64 columns wide, come first. They bring x's rows into L2.
            depth += fraction * left * 64 / right
            moved += size * rank * left
            flops += 2.0 * active * rank * left
    speed = _peak(problem, rates) * VENDOR_EFFICIENCY * efficiency
    if not schedule.full_rate:
        speed *= OLD_INSTRUCTIONS.get(problem.arch, 1.0)
    blocks = -(-rows // tile[0]) * column_tiles * schedule.splits
    share = min(1.0, STREAMS * blocks / rates.sms)
    waves = _waves(rates, rows, right * schedule.splits, tile)
    arithmetic = waves * 2.0 * tile[0] * tile[1] * depth / schedule.splits / (speed / rates.sms)
    total = LAUNCH + max((moved + again) / (rates.bandwidth * max(share, 1e-9)), arithmetic)
    what = f"{schedule.kernel} {tile[0]} × {tile[1]}"
    return Launch(what, moved, flops, total if rows and right else 0.0)


def _stream(what: str, rates: Rates, moved: float) -> Launch:
    """A launch that is limited by the bytes it moves."""
    return Launch(what, moved, 0.0, LAUNCH + moved / rates.bandwidth)


def _waves(rates: Rates, rows: int, columns: int, tile: tuple[int, int]) -> float:
    """The number of waves: how often all multiprocessors get a tile."""
    tiles = -(-rows // tile[0]) * -(-columns // tile[1])
    return -(-tiles // rates.sms)


def _peak(problem: Problem, rates: Rates) -> float:
    return rates.float32 if problem.dtype == torch.float32 else rates.tensor
