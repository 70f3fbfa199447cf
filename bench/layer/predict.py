"""ESTIMATES of the time over the base linear, for each GPU, by the cost model. Nothing is measured.

    python bench/run.py --mode predict [--k 4096] [--n 4096] [--r 32] [--efficiency 0.85]

For each regime and GPU a cell shows the shortest time that the cuda and triton backends would take
with their own tiles, over the time of the frozen linear by the vendor's library, and the strategy
that takes it. docs/kernels.md holds this output.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from alora_kernels.backends.cuda.program import schedules as cuda_schedules
from alora_kernels.backends.triton.schedule import schedules as triton_schedules
from alora_kernels.contract import STRATEGIES, Problem
from alora_kernels.dispatch import cost
from alora_kernels.hardware import GPUS, Rates
from bench.common import flags

ARCHS = {
    "A100": 80, "L40S": 89, "RTX 4090": 89, "H100": 90, "H200": 90, "B200": 100, "RTX 5090": 120,
}  # fmt: skip


class Regime(NamedTuple):
    """One line of the table."""

    rows: int  # M
    fraction: float  # f
    backward: bool


REGIMES = (
    Regime(1, 1.0, False),
    Regime(16, 1.0, False),
    Regime(256, 1.0, False),
    Regime(2048, 1.0, False),
    Regime(8192, 0.1, False),
    Regime(8192, 1.0, False),
    Regime(8192, 0.1, True),
    Regime(8192, 1.0, True),
)


def problems(regime: Regime, arch: int, k: int, n: int, rank: int) -> list[Problem]:
    """The forward, and the backward if the regime has one: bf16, adapters in float32."""
    active = max(1, round(regime.fraction * regime.rows))
    passes = (False, True) if regime.backward else (False,)
    return [
        Problem(
            regime.rows, k, (n,), (rank,), active, torch.bfloat16, torch.float32, "cuda", arch,
            backward,
        )
        for backward in passes
    ]  # fmt: skip


def ways(problem: Problem, rates: Rates, efficiency: float) -> Iterator[tuple[float, str]]:
    """(seconds, strategy) of every backend and strategy."""
    for strategy in STRATEGIES:
        for schedules in (
            cuda_schedules(problem, strategy, (rates.sms, problem.arch)),
            triton_schedules(problem, strategy, rates.sms),
        ):
            yield (
                cost.seconds(problem, strategy, schedules or None, rates, efficiency),
                strategy,
            )


def cell(
    regime: Regime, gpu: str, k: int, n: int, rank: int, efficiency: float
) -> tuple[float, list[str]]:
    """The time over the base linear, and the strategy of each pass."""
    rates = GPUS[gpu]
    total = base = 0.0
    names = []
    for problem in problems(regime, ARCHS[gpu], k, n, rank):
        seconds, strategy = min(ways(problem, rates, efficiency))
        total += seconds
        base += cost.base_seconds(problem, rates)
        names.append(strategy)
    return total / base, names


def lines(k: int, n: int, rank: int, efficiency: float) -> Iterator[str]:
    """The output: two tables in markdown."""
    yield f"ESTIMATE, not measured: time over the base linear, bf16, K={k}, N={n}, R={rank}."
    yield ""
    yield "| | " + " | ".join(ARCHS) + " |"
    yield "|---|" + "---|" * len(ARCHS)
    for regime in REGIMES:
        what = "forward + backward" if regime.backward else "forward"
        cells = []
        for gpu in ARCHS:
            ratio, names = cell(regime, gpu, k, n, rank, efficiency)
            cells.append(f"{ratio:.2f} {', '.join(dict.fromkeys(names))}")
        yield f"| {what} M={regime.rows}, f={regime.fraction:g} | " + " | ".join(cells) + " |"
    yield ""
    yield (
        f"The vendor's GEMM is taken to reach {cost.VENDOR_EFFICIENCY:g} of the data sheet's rate, "
        f"ours {efficiency:g} of the vendor's; a launch costs {cost.LAUNCH * 1e6:g} µs:"
    )
    yield ""
    yield "| data sheet | " + " | ".join(ARCHS) + " |"
    yield "|---|" + "---|" * len(ARCHS)
    rates = [GPUS[gpu] for gpu in ARCHS]
    yield "| 16-bit TFLOP/s, dense | " + " | ".join(f"{r.tensor / 1e12:g}" for r in rates) + " |"
    yield "| memory TB/s | " + " | ".join(f"{r.bandwidth / 1e12:g}" for r in rates) + " |"
    yield "| multiprocessors | " + " | ".join(str(r.sms) for r in rates) + " |"


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = flags.make_parser("predict", __doc__)
    for name, default in (("k", 4096), ("n", 4096), ("r", 32)):
        p.add_argument(f"--{name}", type=flags.positive, default=default, help=name.upper())
    about = "of our GEMM over the vendor's"
    p.add_argument("--efficiency", type=float, default=cost.OUR_EFFICIENCY, help=about)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the estimates."""
    return flags.run(parser(), arguments, _print_estimates)


def _print_estimates(o: argparse.Namespace) -> int:
    if not o.efficiency > 0:
        raise flags.UsageError(f"--efficiency {o.efficiency:g}: expected a number above 0")
    print("\n".join(lines(o.k, o.n, o.r, o.efficiency)))
    return 0
