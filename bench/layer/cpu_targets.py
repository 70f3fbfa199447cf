"""The package's targets on a CPU, and whether it meets them.

    python bench/run.py --mode cpu-targets

The package, the frozen nn.Linear and PEFT's own layer are measured in one run: forward + backward
at a training size, once without the prefix's gradient and once with dropout, and decoding one
token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console

from bench.common import flags, report
from bench.common.clocks import CpuClock, interleave, peak_memory
from bench.common.machine import describe_machine
from bench.common.statistics import Timing, ratio_spread
from bench.layer.cases import DTYPES, Case, make_tensors, rows_from_offset
from bench.layer.check import check_all
from bench.layer.variants import BaseLinear, Package, PeftLayer

FEATURES = 2048  # K = N
RANK = 32


@dataclass(frozen=True)
class Target:
    """One line of the table: a size, with the bounds for each dtype."""

    batch: int
    seq_len: int
    active: int  # tokens of each sequence
    over_base: dict[str, float]  # at most
    peft_over: dict[str, float]  # at least
    backward: bool = True
    prefix_grad: bool = True
    dropout_p: float = 0.0
    threads: tuple[int, ...] = field(default=(2,))

    def cases(self) -> Iterator[tuple[int, Case]]:
        """The number of threads and the case, for each dtype that has a bound."""
        rows = rows_from_offset(self.batch, self.seq_len, self.active)
        for threads in self.threads:
            for dtype in self.over_base:
                yield (
                    threads,
                    Case(
                        model="CPU target",
                        layer="linear",
                        in_features=FEATURES,
                        out_features=FEATURES,
                        rank=RANK,
                        rows=rows,
                        dtype=DTYPES[dtype],
                        adapter_dtype=torch.float32,  # PEFT's default over a 16-bit base
                        backward=self.backward,
                        prefix_grad=self.prefix_grad,
                        dropout_p=self.dropout_p,
                    ),
                )


TARGETS = (
    Target(2, 1024, 102, {"fp32": 1.07, "bf16": 1.07}, {"fp32": 1.07, "bf16": 1.07}),
    Target(2, 1024, 1024, {"fp32": 1.15, "bf16": 1.20}, {"fp32": 1.12, "bf16": 1.12}),
    Target(
        2,
        1024,
        102,
        {"fp32": 0.70, "bf16": 0.70},
        {"fp32": 1.6, "bf16": 1.6},
        prefix_grad=False,
    ),
    Target(2, 1024, 1024, {"fp32": 1.45}, {"fp32": 1.0}, dropout_p=0.05),
    Target(
        1,
        1,
        1,
        {"fp32": 1.5, "bf16": 1.5},
        {"fp32": 1.15, "bf16": 1.10},
        backward=False,
        threads=(1, 2),
    ),
)


@dataclass(frozen=True)
class Line:
    """One measured line."""

    target: Target
    case: Case
    threads: int
    base: Timing
    ours: Timing
    peft: Timing
    extra_bytes: int | None  # peak memory of a training step, less the base linear's
    allowed_bytes: int | None

    @property
    def label(self) -> str:
        case = self.case
        label = f"{case.rows.batch}×{case.rows.seq_len}, {self.target.active}"
        label += ", forward" if not case.backward else ""
        label += ", no prefix grad" if not case.prefix_grad else ""
        return label + (f", dropout {case.dropout_p:g}" if case.dropout_p else "")

    @property
    def over_base(self) -> float:
        return self.ours.median / self.base.median

    @property
    def peft_over(self) -> float:
        return self.peft.median / self.ours.median

    @property
    def spreads(self) -> dict[str, float]:
        """The spread of each of the two ratios."""
        where = f"{self.label}, {self.case.dtype_name}, {self.threads} threads"
        return {
            f"× base, {where}": ratio_spread(self.ours.samples, self.base.samples),
            f"PEFT ÷, {where}": ratio_spread(self.peft.samples, self.ours.samples),
        }

    @property
    def met(self) -> bool:
        dtype = self.case.dtype_name
        fast = self.over_base <= self.target.over_base[dtype]
        faster = self.peft_over >= self.target.peft_over[dtype]
        lean = self.extra_bytes is None or self.extra_bytes <= (self.allowed_bytes or 0)
        return fast and faster and lean


def allowed_memory(case: Case) -> int:
    """2·(f·M·R) elements and the gradients of lora_a and lora_b, in bytes."""
    low_rank = 2 * case.rows.num_active * case.rank * case.dtype.itemsize
    adapter = case.rank * (case.in_features + case.out_features)
    return low_rank + adapter * case.adapter_dtype.itemsize


def measure_line(target: Target, case: Case, threads: int, seconds: float, seed: int) -> Line:
    """Check the three variants of one line, then measure their time and memory."""
    torch.set_num_threads(threads)
    variants = (BaseLinear(), Package("cpu", "delta"), PeftLayer())
    tensors = make_tensors(case, seed)
    # PEFT has no prefix_grad. It is measured and checked with the whole gradient.
    plain = case.but(prefix_grad=True)
    cases = {v.name: plain if isinstance(v, PeftLayer) else case for v in variants}
    for variant in variants:
        wrong = check_all([variant], [cases[variant.name]], tensors)
        if wrong:
            raise SystemExit(f"error: {wrong[variant.name]}")
    steps = {v.name: v.build(cases[v.name], tensors) for v in variants}
    with torch.set_grad_enabled(case.backward):
        timings, _ = interleave(steps, CpuClock(), seconds=seconds)
        extra = allowed = None
        if case.backward:
            device = torch.device("cpu")
            least, most = (peak_memory(steps[v.name], device) for v in variants[:2])
            extra, allowed = most - least, allowed_memory(case)
    base, ours, peft = (timings[v.name] for v in variants)
    return Line(target, case, threads, base, ours, peft, extra, allowed)


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = flags.make_parser("cpu-targets", __doc__)
    flags.add_device(p)
    flags.add_timing(p, seconds_together=150.0)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every line and print the table."""
    return flags.run(parser(), arguments, _measure)


def _measure(o: argparse.Namespace) -> int:
    if o.device.type != "cpu":
        raise flags.UsageError("--mode cpu-targets measures the CPU: add --device cpu")
    console = report.make_console()
    report.print_lines(console, f"{describe_machine(o.device)} | seed {o.seed}")
    work = [(t, case, threads) for t in TARGETS for threads, case in t.cases()]
    lines = []
    with report.make_progress() as progress:
        for target, case, threads in progress.track(work, description="CPU targets"):
            lines.append(measure_line(target, case, threads, o.seconds / len(work), o.seed))
    print_table(console, lines)
    return 0


def print_table(console: Console, lines: Sequence[Line]) -> None:
    """Print every line, each target beside its measured value."""
    words = ("B×T, active", "dtype", "met")
    figures = ("base ms", "ours ms", "PEFT ms", "±", "× base (≤)", "PEFT ÷ (≥)", "extra KiB (≤)")
    title = f"CPU targets: K=N={FEATURES}, R={RANK}, fp32 adapters, medians of interleaved runs"
    table = report.make_table(title, (*words[:2], "thr", *figures, words[2]), left=words)
    spreads = {}
    for line in lines:
        dtype, timings = line.case.dtype_name, (line.base, line.ours, line.peft)
        memory = "–"
        if line.extra_bytes is not None and line.allowed_bytes is not None:
            memory = f"{line.extra_bytes / 1024:,.0f} ({line.allowed_bytes / 1024:,.0f})"
        table.add_row(
            line.label,
            dtype,
            str(line.threads),
            *(f"{timing.median * 1e3:.3f}" for timing in timings),
            f"{max(timing.spread for timing in timings):.0%}",
            f"{line.over_base:.3f} ({line.target.over_base[dtype]:.2f})",
            f"{line.peft_over:.3f} ({line.target.peft_over[dtype]:.2f})",
            memory,
            "yes" if line.met else "no",
        )
        spreads.update(line.spreads)
    console.print(table)
    report.warn_of_spread(console, spreads)
