"""One adapted linear layer: this package, PEFT, the base linear, and five lines by hand.

python bench/run.py                                     the small models, about two minutes
python bench/run.py --model Mistral-7B --active 0.1,0.5
python bench/run.py --csv out.csv --plot out.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console

from alora_kernels.contract import STRATEGIES
from alora_kernels.dispatch import BACKENDS
from bench.common import flags, report
from bench.common.machine import describe_machine
from bench.layer.cases import DTYPES, MODELS
from bench.layer.measure import Measured, measure_all
from bench.layer.results import print_results, with_ratios, write_plot
from bench.layer.selection import cases_of, clocks_of, variants_of

PASSES = {"fwd": (False,), "fwd+bwd": (True,), "both": (False, True)}


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = flags.make_parser("layer", __doc__)
    add = p.add_argument
    positive, ways = flags.positive, ("all", "auto")
    add(
        "--model", type=flags.names_of(MODELS), help=f"comma-separated, or all: {', '.join(MODELS)}"
    )
    add("--shape", type=flags.shapes, help="KxN[,KxN...]: layers of these sizes, not a model's")
    add("--batch", type=positive, help="sequences in a batch (default: 2, on a GPU 8)")
    add("--seq-len", type=positive, help="tokens of a sequence (default: 512, on a GPU 1024)")
    about = "text, or fractions such as 0.1,1"
    add("--active", type=flags.active_fractions, default="text", help=about)
    add("--rank", type=positive, default=32, help="R")
    about = f"comma-separated: {', '.join(DTYPES)} (default: fp32,bf16; on a GPU bf16)"
    add("--dtype", type=flags.names_of(DTYPES), help=about)
    about = "dtype of lora_a and lora_b; PEFT keeps them in fp32"
    add("--adapter-dtype", choices=("fp32", "same"), default="fp32", help=about)
    about = "arithmetic of this package's adapter over a 16-bit layer"
    add("--adapter-precision", choices=("compute", "fp32"), default="compute", help=about)
    add("--pass", dest="direction", choices=PASSES, default="both", help="what is timed")
    about = "this package's; all: those that can run; auto: as dispatch chooses"
    add("--backend", choices=(*ways, *BACKENDS), default="all", help=about)
    add("--strategy", choices=(*ways, *STRATEGIES), default="all", help=about)
    add("--no-peft", action="store_true", help="leave PEFT's layer out")
    about = "on a GPU: time replayed CUDA graphs, eager calls, or both"
    add("--cuda-graphs", choices=("both", "on", "off"), default="both", help=about)
    flags.add_device(p)
    flags.add_threads(p)
    flags.add_timing(p, seconds_together=60.0)
    flags.add_files(p, plot="the time over the base linear")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 when a variant's result was wrong."""
    return flags.run(parser(), arguments, _measure)


def _measure(o: argparse.Namespace) -> int:
    torch.set_num_threads(o.threads)
    console = report.make_console()
    machine = describe_machine(o.device)
    report.print_lines(console, f"{machine} | seed {o.seed}")
    cases = list(cases_of(o))
    measured = measure_all(
        cases,
        variants_of(o, cases),
        clocks_of(o),
        directions=PASSES[o.direction],
        seconds=o.seconds,
        seed=o.seed,
        progress=report.make_progress(),
    )
    _show(o, console, measured, machine)
    return 1 if measured.left_out else 0


def _show(o: argparse.Namespace, console: Console, measured: Measured, machine: str) -> None:
    for reason in measured.left_out:
        console.print("left out:", style="bold red", end=" ")
        report.print_lines(console, reason)
    report.print_lines(console, *(f"not timed: {note}" for note in measured.notes))
    results = with_ratios(measured.results)
    print_results(console, results)
    report.warn_of_spread(console, measured.spreads)
    if o.csv:
        report.write_csv(o.csv, results)
    if o.plot:
        write_plot(o.plot, results, machine)
