"""The cost model that ranks strategies on a GPU: a pure function of the problem.

Time of a launch = fixed cost + max(bytes / bandwidth, FLOPs / rate), the FLOPs of a matrix product
rounded up to whole waves of tiles. A strategy's time is the sum over its launches. The rates are
data-sheet figures; the efficiencies say how near a GEMM comes to them. They are estimates until
`bench/run.py --tune` has measured this GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .backends import Problem


@dataclass(frozen=True)
class Rates:
    """Data-sheet rates of one GPU (dense, without sparsity)."""

    tensor: float  # 16-bit tensor-core FLOP/s
    float32: float  # IEEE float32 FLOP/s
    bandwidth: float  # bytes/s of device memory
    sms: int


# Source: NVIDIA's data sheets of the A100 SXM 80 GB, A10, L40S, H100 SXM, B200 and RTX 5090.
RATES = {
    80: Rates(312e12, 19.5e12, 2.04e12, 108),
    86: Rates(125e12, 31.2e12, 0.60e12, 72),
    89: Rates(362e12, 91.6e12, 0.86e12, 142),
    90: Rates(989e12, 67e12, 3.35e12, 132),
    100: Rates(2250e12, 75e12, 8.0e12, 148),
    120: Rates(419e12, 105e12, 1.79e12, 170),
}
VENDOR_EFFICIENCY = 0.75  # of the data-sheet rate, for a large GEMM of the vendor's library
OUR_EFFICIENCY = 0.85  # of the vendor's GEMM, until measured
LAUNCH = 2.5e-6  # seconds between the starts of two short kernels on one stream
NARROW_TILE = 16  # tensor cores multiply at least 16 columns: a smaller R costs as much
L2_SHARE = 0.55  # time of a byte read again from L2, relative to one from device memory


def rates_of(arch: int) -> Rates:
    """The rates of `arch` (80, 90, ...), or of the nearest older one that is known."""
    known = [a for a in RATES if a <= arch]
    return RATES[max(known)] if known else RATES[80]


def seconds(problem: Problem, strategy: str) -> float:
    """Estimated time of the forward or backward of `problem` by `strategy`.

    Counts the whole pass: base, adapter and, in backward, dx, dA and dB.
    """
    rates = rates_of(problem.arch)
    rows, depth, active = problem.rows, problem.in_features, problem.active
    size = problem.dtype.itemsize
    total = 0.0
    for width, rank in zip(problem.out_features, problem.ranks):
        rank = -(-rank // NARROW_TILE) * NARROW_TILE
        left, right = (width, depth) if problem.backward else (depth, width)
        if not problem.base_given:
            total += _base(problem, rates, strategy, rows, left, right, rank)
        narrow = _launch(rates, size * (active * (left + rank) + rank * left), 0.0)
        wide = _launch(rates, size * (active * (2 * right + rank) + rank * right), 0.0)
        if strategy == "delta" or problem.base_given:
            total += narrow + wide
        elif strategy == "tail":
            total += narrow
        if problem.backward:
            # dB reads dy again, dA reads x: one launch each.
            total += _launch(rates, size * active * (left + rank), 0.0)
            total += _launch(rates, size * active * (right + rank), 0.0)
    return total


def _base(
    problem: Problem, rates: Rates, strategy: str, rows: int, left: int, right: int, rank: int
) -> float:
    """The launch that computes the base, with what the strategy adds to it."""
    size = problem.dtype.itemsize
    fraction = problem.active / rows if rows else 0.0
    bytes_moved = float(size * (rows * (left + right) + left * right))
    flops = 2.0 * rows * left * right
    peak = rates.float32 if problem.dtype == torch.float32 else rates.tensor
    speed = peak * VENDOR_EFFICIENCY * (1.0 if strategy == "delta" else OUR_EFFICIENCY)
    if strategy == "tail":
        flops += 2.0 * fraction * rows * rank * right
        bytes_moved += size * rank * (problem.active + right)
    elif strategy == "onepass":
        # Every column tile forms the narrow product of its rows anew.
        tiles = -(-right // 256)
        flops += 2.0 * fraction * rows * rank * (left * tiles + right)
        bytes_moved += size * rank * (left + right)
        if rows <= 16:
            # lora_a is read from L2 by every column tile while the weight streams by.
            bytes_moved += L2_SHARE * size * rank * left * (-(-right // 64))
    return _launch(rates, bytes_moved, flops / speed)


def _launch(rates: Rates, bytes_moved: float, arithmetic: float) -> float:
    return LAUNCH + max(bytes_moved / rates.bandwidth, arithmetic)
