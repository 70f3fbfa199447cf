"""The cost model that ranks strategies on a GPU: a pure function of the problem and the schedule.

Time of a launch = fixed cost + max(bytes / bandwidth, arithmetic). A GEMM's arithmetic is whole
waves of its tiles, one tile on a multiprocessor at a time; where too few blocks ask for bytes to
keep the memory busy they get their share of the bandwidth. A strategy's time is the sum over its
launches.
The rates are data-sheet figures; the efficiencies say how near a GEMM comes to them. They are
estimates until `bench/run.py --tune` has measured this GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .contract import Problem


@dataclass(frozen=True)
class Rates:
    """Data-sheet rates of one GPU (dense, without sparsity)."""

    name: str
    tensor: float  # 16-bit tensor-core FLOP/s with float32 accumulation
    float32: float  # IEEE float32 FLOP/s
    bandwidth: float  # bytes/s of device memory
    sms: int


# Source: NVIDIA's data sheets and architecture papers (Ampere, Ada, Hopper, Blackwell).
GPUS: dict[str, Rates] = {
    r.name: r
    for r in (
        Rates("A100", 312e12, 19.5e12, 2.04e12, 108),  # SXM, 80 GB
        Rates("A10", 125e12, 31.2e12, 0.60e12, 72),
        Rates("L40S", 362e12, 91.6e12, 0.864e12, 142),
        Rates("RTX 4090", 165e12, 82.6e12, 1.008e12, 128),
        Rates("H100", 989e12, 67e12, 3.35e12, 132),  # SXM
        Rates("H200", 989e12, 67e12, 4.8e12, 132),  # SXM
        Rates("B200", 2250e12, 75e12, 8.0e12, 148),
        Rates("RTX 5090", 210e12, 105e12, 1.79e12, 170),
        Rates("MI300X", 1307e12, 163e12, 5.3e12, 304),  # AMD's data sheets
        Rates("MI355X", 2517e12, 157e12, 8.0e12, 256),
    )
}
ARCHS = {
    80: "A100",
    86: "A10",
    89: "L40S",
    90: "H100",
    100: "B200",
    120: "RTX 5090",
    942: "MI300X",
    950: "MI355X",
}

VENDOR_EFFICIENCY = 0.75  # of the data-sheet rate, for a large GEMM of the vendor's library
OUR_EFFICIENCY = 0.85  # of the vendor's GEMM, until measured
# What mma.sync reaches of the rate where only newer instructions use the tensor cores in full.
OLD_INSTRUCTIONS = {90: 0.62, 100: 0.30}
LAUNCH = 2.5e-6  # seconds between the starts of two short kernels on one stream
NARROW_TILE = 16  # tensor cores multiply at least 16 columns: a smaller R costs as much
L2_SHARE = 0.55  # time of a byte read again from L2, relative to one from device memory
STREAMS = 2  # times over that one multiprocessor can take its share of the bandwidth
VENDOR_TILES = ((128, 256), (128, 128), (64, 128), (16, 64))  # the library picks the quickest
PARTS = 2  # float32 parts of dA or dB that are written and read for each multiprocessor


class Schedule(NamedTuple):
    """What a backend would launch for the base with a strategy's part in it."""

    kernel: str  # "gemm", "decode" (onepass with split K) or "fused" (tail with xa made inside)
    rows: int  # of a tile
    columns: int  # of a tile, without those of lora_a
    full_rate: bool = True  # the tensor cores' newest instructions
    splits: int = 1  # of K


TILES = (
    *[Schedule("gemm", m, n) for m, n in VENDOR_TILES[:3]],
    Schedule("decode", 16, 64, splits=4),
)


class Launch(NamedTuple):
    """One launch of a strategy, as the model sees it."""

    what: str
    bytes: float
    flops: float
    seconds: float


def rates_of(arch: int) -> Rates:
    """The rates of `arch` (80, 90, ...), or of the nearest older one that is known."""
    known = [a for a in ARCHS if a <= arch]
    return GPUS[ARCHS[max(known) if known else 80]]


def seconds(
    problem: Problem,
    strategy: str,
    schedules: Sequence[Schedule] | None = None,
    rates: Rates | None = None,
    efficiency: float = OUR_EFFICIENCY,
) -> float:
    """Estimated time of the forward or backward of `problem` by `strategy`."""
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
    """The launches of the whole pass: base, adapter and, in backward, dx, dA and dB.

    `schedules` has one for each projection; without it the quickest of `TILES` is assumed.
    `efficiency` is that of our GEMM over the vendor's.
    """
    rates = rates or rates_of(problem.arch)
    active, size = problem.active, problem.dtype.itemsize
    ranks = [-(-rank // NARROW_TILE) * NARROW_TILE for rank in problem.ranks]
    fused = strategy != "delta" and not problem.base_given
    found: list[Launch] = []
    inside = False
    shrinks: list[tuple[int, int]] = []  # bytes without the wide operand, its columns
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
            else:  # one launch reads x once for all projections
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
    """Estimated time of the frozen layers alone, by the vendor's library."""
    rates = rates or rates_of(problem.arch)
    total = 0.0
    for width in problem.out_features:
        left, right = (width, problem.in_features) if problem.backward else (
            problem.in_features, width)  # fmt: skip
        total += _vendor(problem, rates, left, right).seconds
    return total


def _vendor(problem: Problem, rates: Rates, left: int, right: int) -> Launch:
    """The base by the vendor's library."""
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
    """The base with the strategy's part in it."""
    rows, active, size = problem.rows, problem.active, problem.dtype.itemsize
    fraction = active / rows if rows else 0.0
    tile = (schedule.rows, schedule.columns)
    column_tiles = -(-right // schedule.columns)
    moved = float(size * (rows * (left + right) + left * right))
    depth = float(left)  # steps of K that one tile multiplies, the strategy's included
    flops = 2.0 * rows * left * right
    again = 0.0  # bytes from L2 that nothing hides
    if strategy == "onepass":
        # Every column tile forms the narrow product of its rows anew.
        depth += fraction * (left * rank / schedule.columns + rank)
        moved += size * rank * (left + right)
        flops += 2.0 * active * rank * (left * column_tiles + right)
        if rows <= 16:
            # lora_a is read from L2 by every column tile while the weight streams by.
            again = L2_SHARE * size * rank * left * column_tiles
    else:
        depth += fraction * rank
        moved += size * rank * (active + right)
        flops += 2.0 * active * rank * right
        if schedule.kernel == "fused":
            # Narrow tiles, 64 columns wide, come first; x's rows are then in L2.
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
    """A launch whose time is its bytes."""
    return Launch(what, moved, 0.0, LAUNCH + moved / rates.bandwidth)


def _waves(rates: Rates, rows: int, columns: int, tile: tuple[int, int]) -> float:
    """Turns of the whole machine."""
    tiles = -(-rows // tile[0]) * -(-columns // tile[1])
    return -(-tiles // rates.sms)


def _peak(problem: Problem, rates: Rates) -> float:
    return rates.float32 if problem.dtype == torch.float32 else rates.tensor
