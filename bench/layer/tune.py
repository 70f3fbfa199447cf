"""Times every strategy on this GPU, so that dispatch can choose by measurements.

    python bench/run.py --tune [--shape 4096x4096] [--seconds 180]

A small grid of layers is checked and timed with the benchmark's own code (CUDA graphs, an L2 cache
that holds no operand, medians of interleaved rounds). The times go to a json file, which dispatch
prefers to its cost model. A table shows where the model alone would have chosen a slower strategy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from alora_kernels import dispatch
from alora_kernels.contract import STRATEGIES
from alora_kernels.dispatch import measured
from alora_kernels.dispatch.measured import Measurement
from alora_kernels.run import forget
from bench.common import flags, report
from bench.common.clocks import Clock, CudaClock, interleave
from bench.common.machine import arch_of, describe_machine
from bench.common.statistics import Timing, geometric_mean
from bench.layer.cases import Case, layer_cases, make_tensors, rows_from_fraction
from bench.layer.check import check_all, describe
from bench.layer.variants import Package

SHAPES = (
    (4096, 4096),
    (4096, 14336),
)  # (in_features, out_features) of attention and MLP in an 8B model
ROWS = ((1, 1.0), (16, 1.0), (256, 1.0), (2048, 0.1), (2048, 1.0), (8192, 0.1), (8192, 1.0))
RANKS = (16, 64)
NO_GPU = (
    "--tune needs a GPU: it times the kernels on the GPU that will run them, and torch sees none "
    "here. Run it on that machine. Without a tuning, dispatch uses its cost model, which "
    "`python bench/run.py --mode predict` shows."
)

Pair = tuple[str, str]  # backend, strategy
Measure = Callable[[Case, Sequence[Package]], dict[str, Timing]]  # the times by the variants' names


class TuningError(Exception):
    """A result was wrong, or there is nothing to measure."""


class Line(NamedTuple):
    """One case: for each pair, the measured time and the seconds that the cost model expects."""

    case: Case
    measured: dict[Pair, Timing]
    expected: dict[Pair, float]

    @property
    def fastest(self) -> Pair:
        return min(self.measured, key=lambda pair: self.measured[pair].median)

    @property
    def picked(self) -> Pair:
        """The pair that the model would choose among those measured."""
        return min(self.measured, key=self.expected.__getitem__)

    @property
    def loss(self) -> float:
        """The time of the pair that the model would choose, over that of the fastest."""
        return self.measured[self.picked].median / self.measured[self.fastest].median


def grid(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[tuple[int, float]] = ROWS,
    ranks: Sequence[int] = RANKS,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Case]:
    """The cases to measure: each forward, and forward + backward if it has rows to train on."""
    found = []
    batches = [rows_from_fraction(1, m, f, device) for m, f in rows]
    named = [("tune", f"{k}x{n}", k, n) for k, n in shapes]
    for rank in ranks:
        cases = layer_cases(named, batches, rank=rank, dtypes=[dtype], adapter_dtype=torch.float32)
        for case in cases:
            found.append(case.but(backward=False))
            if case.rows.num_rows > 16:
                found.append(case)
    return found


def measurer(clocks: Sequence[Clock], seconds: float, seed: int) -> Measure:
    """A function that checks and times a case, for about `seconds`.

    A call that one clock cannot time is left to the next.
    """

    def measure(case: Case, variants: Sequence[Package]) -> dict[str, Timing]:
        tensors = make_tensors(case, seed)
        wrong = check_all(variants, [case], tensors)
        if wrong:
            raise TuningError("\n".join(wrong.values()))
        found: dict[str, Timing] = {}
        with torch.set_grad_enabled(case.backward):
            left = {v.name: v.build(case, tensors) for v in variants}
            for clock in clocks:
                timings, refused = interleave(left, clock, seconds=seconds)
                found.update(timings)
                left = {name: left[name] for name in refused}
                if not left:
                    break
        return found

    return measure


def able(case: Case, arch: int, device: str = "cuda") -> list[Pair]:
    """The pairs of backend and strategy that can run a case."""
    problems = [case.problem(device, arch, backward) for backward in case.passes]
    return [
        (name, strategy)
        for name, backend in dispatch.BACKENDS.items()
        if name != "reference" and backend.why_not_here() is None
        for strategy in STRATEGIES
        if all(backend.why_not(problem, strategy) is None for problem in problems)
    ]


def expected(case: Case, pair: Pair, arch: int, device: str = "cuda") -> float:
    """The cost model's time of a case, over all of its passes."""
    name, strategy = pair
    return sum(
        dispatch.model_seconds(
            dispatch.BACKENDS[name], case.problem(device, arch, backward), strategy
        )
        for backward in case.passes
    )


def tune(
    cases: Sequence[Case], measure: Measure, arch: int, progress: Progress, device: str = "cuda"
) -> list[Line]:
    """Measure all pairs in all cases."""
    lines = []
    task = progress.add_task("tuning", total=len(cases))
    with progress:
        for case in cases:
            rows = case.rows.num_rows
            progress.update(task, description=f"{case.layer} M={rows} {case.pass_name}")
            pairs = {Package(*pair).name: pair for pair in able(case, arch, device)}
            times = measure(case, [Package(*pair) for pair in pairs.values()]) if pairs else {}
            measured = {pairs[name]: timing for name, timing in times.items()}
            if measured:
                model = {pair: expected(case, pair, arch, device) for pair in measured}
                lines.append(Line(case, measured, model))
            progress.advance(task)
    return lines


def measurements(lines: Sequence[Line]) -> list[Measurement]:
    """What goes into the file."""
    return [
        Measurement(
            *pair,
            rows=line.case.rows.num_rows,
            in_features=line.case.in_features,
            out_features=line.case.out_features,
            rank=line.case.rank,
            active=line.case.rows.num_active,
            dtype=str(line.case.dtype).removeprefix("torch."),
            backward=line.case.backward,
            seconds=timing.median,
            model_seconds=line.expected[pair],
        )
        for line in lines
        for pair, timing in line.measured.items()
    ]


def print_result(console: Console, lines: Sequence[Line]) -> None:
    """Print where the model was wrong, and how far its times are off overall."""
    wrong = [line for line in lines if line.picked != line.fastest]
    if wrong:
        words = ("pass", "fastest", "model's pick")
        sizes = ("M", "K", "N", "R", "active")
        columns = (*sizes, "pass", "fastest", "µs", "model's pick", "µs", "slower by")
        title = "Where the cost model alone picks a slower strategy"
        table = report.make_table(title, columns, left=words)
        for line in wrong:
            case = line.case
            table.add_row(
                *map(str, (case.rows.num_rows, case.in_features, case.out_features, case.rank)),
                str(case.rows.num_active),
                case.pass_name,
                "/".join(line.fastest),
                f"{line.measured[line.fastest].median * 1e6:.1f}",
                "/".join(line.picked),
                f"{line.measured[line.picked].median * 1e6:.1f}",
                f"{line.loss - 1:.1%}",
            )
        console.print(table)
    right = len(lines) - len(wrong)
    report.print_lines(
        console, f"The model's pick was the fastest in {right} of {len(lines)} cases."
    )
    spreads = {}
    for pair in dict.fromkeys(pair for line in lines for pair in line.measured):
        mine = [line for line in lines if pair in line.measured]
        ratio = geometric_mean(line.measured[pair].median / line.expected[pair] for line in mine)
        name = "/".join(pair)
        report.print_lines(console, f"{name}: {ratio:.2f} × the model's time (geometric mean)")
        for line in mine:
            spreads[f"{name} ÷ the model, {describe(line.case)}"] = line.measured[pair].spread
    report.warn_of_spread(console, spreads)


def run_tune(
    console: Console, cases: Sequence[Case], measure: Measure, *, arch: int, device_name: str,
    progress: Progress,
) -> list[Line]:  # fmt: skip
    """Measure, write the file, print the table."""
    lines = tune(cases, measure, arch, progress)
    if not lines:
        raise TuningError("no backend can run here; python -m alora_kernels says why")
    file = measured.path()
    measured.write(file, measured.key_of(device_name), measurements(lines))
    forget()
    print_result(console, lines)
    report.print_lines(console, f"written for {device_name}: {file}")
    return lines


# ---------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = flags.make_parser("tune", __doc__)
    every = ",".join(f"{k}x{n}" for k, n in SHAPES)
    p.add_argument("--shape", type=flags.shapes, default=every, help="KxN[,KxN...]")
    flags.add_device(p)
    flags.add_timing(p, seconds_together=180.0)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure this GPU. Returns 1, and writes nothing, if a result was wrong."""
    return flags.run(parser(), arguments, _tune_gpu)


def _tune_gpu(o: argparse.Namespace) -> int:
    if o.device.type != "cuda":
        raise flags.UsageError(NO_GPU)
    console = report.make_console()
    report.print_lines(console, f"{describe_machine(o.device)} | seed {o.seed}")
    cases = grid(o.device, shapes=o.shape)
    clocks = [CudaClock(o.device, graph) for graph in (True, False)]
    try:
        run_tune(
            console,
            cases,
            measurer(clocks, o.seconds / len(cases), o.seed),
            arch=arch_of(o.device),
            device_name=torch.cuda.get_device_name(o.device),
            progress=report.make_progress(),
        )
    except TuningError as error:
        console.print("nothing is written:", style="bold red", end=" ")
        report.print_lines(console, str(error))
        return 1
    return 0
