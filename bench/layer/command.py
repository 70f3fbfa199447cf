"""One adapted linear layer: this package, PEFT, the base linear, and five lines by hand.

python bench/run.py                                     the small models, about two minutes
python bench/run.py --model Mistral-7B --active 0.1,0.5
python bench/run.py --csv out.csv --plot out.png
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
from rich.console import Console

from alora_kernels.backends import STRATEGIES
from alora_kernels.dispatch import BACKENDS
from bench.common.flags import (
    active_fractions,
    add_device,
    add_files,
    add_threads,
    make_parser,
    names_of,
    positive,
    run,
    seconds,
    shapes,
)
from bench.common.machine import describe_machine
from bench.common.report import (
    make_console,
    make_progress,
    print_lines,
    warn_of_spread,
    write_csv,
)
from bench.layer.cases import DTYPES, MODELS
from bench.layer.measure import Measured, measure_all
from bench.layer.results import print_results, with_ratios, write_plot
from bench.layer.selection import cases_of, clocks_of, variants_of

PASSES = {"fwd": (False,), "fwd+bwd": (True,), "both": (False, True)}


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = make_parser("layer", __doc__)
    add = p.add_argument
    add("--model", type=names_of(MODELS), help=f"comma-separated, or all: {', '.join(MODELS)}")
    add("--shape", type=shapes, help="KxN[,KxN...]: layers of these sizes instead of a model's")
    add("--batch", type=positive, help="sequences in a batch (default: 2, on a GPU 8)")
    add("--seq-len", type=positive, help="tokens of a sequence (default: 512, on a GPU 1024)")
    add(
        "--active", type=active_fractions, default=["text"], help="text, or fractions such as 0.1,1"
    )
    add("--rank", type=positive, default=32, help="R (default: 32)")
    add("--dtype", type=names_of(DTYPES), help="fp32, bf16, fp16 (default: fp32,bf16; GPU: bf16)")
    add(
        "--adapter-dtype",
        choices=("fp32", "same"),
        default="fp32",
        help="dtype of lora_a and lora_b (default: fp32, as PEFT keeps them)",
    )
    add(
        "--adapter-precision",
        choices=("compute", "fp32"),
        default="compute",
        help="arithmetic of this package's adapter over a 16-bit layer (default: compute)",
    )
    add("--pass", dest="direction", choices=PASSES, default="both", help="default: both")
    add(
        "--backend",
        choices=("all", "auto", *BACKENDS),
        default="all",
        help="this package's backends (default: all that can run)",
    )
    add(
        "--strategy",
        choices=("all", "auto", *STRATEGIES),
        default="all",
        help="this package's strategies (default: all that can run)",
    )
    add("--no-peft", action="store_true", help="leave PEFT's layer out")
    add(
        "--cuda-graphs",
        choices=("both", "on", "off"),
        default="both",
        help="on a GPU: time replayed CUDA graphs, eager calls, or both (default)",
    )
    add_device(p)
    add_threads(p)
    add("--seconds", type=seconds, default=60.0, help="for timing, all cases together")
    add("--seed", type=int, help="of the operands (default: a fresh one, printed)")
    add_files(p, plot="the time over the base linear")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 when a variant's result was wrong."""
    return run(parser(), arguments, _measure)


def _measure(o: argparse.Namespace) -> int:
    torch.set_num_threads(o.threads)
    seed = o.seed if o.seed is not None else int.from_bytes(os.urandom(3), "little")
    console = make_console()
    machine = describe_machine(o.device)
    print_lines(console, f"{machine} | seed {seed}")
    cases = list(cases_of(o))
    measured = measure_all(
        cases,
        variants_of(o, cases),
        clocks_of(o),
        directions=PASSES[o.direction],
        seconds=o.seconds,
        seed=seed,
        progress=make_progress(),
    )
    _show(o, console, measured, machine)
    return 1 if measured.left_out else 0


def _show(o: argparse.Namespace, console: Console, measured: Measured, machine: str) -> None:
    for reason in measured.left_out:
        console.print("left out:", style="bold red", end=" ")
        print_lines(console, reason)
    print_lines(console, *(f"not timed: {note}" for note in measured.notes))
    results = with_ratios(measured.results)
    print_results(console, results)
    warn_of_spread(console, measured.spreads)
    if o.csv:
        write_csv(o.csv, results)
    if o.plot:
        write_plot(o.plot, results, machine)
