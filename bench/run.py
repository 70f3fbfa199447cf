"""Throughput of masked-LoRA linear layers: this package, PEFT, the base linear, five lines by hand.

    python bench/run.py                                     the small models, about two minutes
    python bench/run.py --model Mistral-7B --active 0.1,0.5
    python bench/run.py --mode cpu-targets                  the package's CPU targets, measured
    python bench/run.py --mode host                         the host's part of a call
    python bench/run.py --tune                              measure this GPU for dispatch
    python bench/run.py --csv out.csv --plot out.png
    python bench/run.py --mode serve --help                 the flags of train, serve or vllm

docs/benchmark.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import DTYPES, MODELS
from cpu_targets import run_targets
from flags import active_fractions, names_of, positive, shapes
from layer import PASSES, UsageError, cases_of, clocks_of, measure_all, variants_of
from machine import describe_machine
from measure import CudaClock
from report import print_results, with_ratios, write_csv, write_plot
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tune import NO_GPU, SHAPES, TuningError, grid, measurer, run_tune

from alora_kernels.backends import STRATEGIES
from alora_kernels.dispatch import BACKENDS

# Modes that stand in a module of their own beside this file, each with `main(arguments) -> int`.
OTHER_MODES = {
    "host": "host",
    "predict": "predict",
    "train": "train",
    "serve": "serve",
    "vllm": "vllm_serving",
}
MODES = ("layer", "cpu-targets", *OTHER_MODES)
DEFAULT_SECONDS = {"layer": 60.0, "cpu-targets": 150.0}
TUNE_SECONDS = 180.0


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = argparse.ArgumentParser(
        prog="bench/run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = p.add_argument
    add("--mode", choices=MODES, default="layer", help="what to measure (default: layer)")
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
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive, default=os.cpu_count() or 1, help="of the CPU")
    add("--seconds", type=float, help="time to spend on timing, all cases together")
    add("--seed", type=int, help="of the operands (default: a fresh one, printed)")
    add("--csv", type=Path, help="write all figures to this file")
    add("--plot", type=Path, help="draw the time over the base linear into this file")
    add(
        "--tune", action="store_true", help="time every strategy on this GPU for dispatch, and quit"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 when a variant's result was wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    mode = _mode_of(arguments)
    if mode in OTHER_MODES:
        return _other_mode(mode, arguments)
    p = parser()
    options = p.parse_args(arguments)
    try:
        return _run(options)
    except UsageError as error:
        p.error(str(error))


def _mode_of(arguments: Sequence[str]) -> str:
    """The mode alone: the other modes have flags of their own."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--mode", default="layer")
    return first.parse_known_args(arguments)[0].mode


def _other_mode(mode: str, arguments: Sequence[str]) -> int:
    name = OTHER_MODES[mode]
    if importlib.util.find_spec(name) is None:
        parser().error(f"--mode {mode}: bench/{name}.py is not part of this checkout")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--mode")
    return int(importlib.import_module(name).main(first.parse_known_args(arguments)[1]) or 0)


def _run(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    if options.tune and (device.type != "cuda" or not torch.cuda.is_available()):
        raise UsageError(NO_GPU)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {options.device}: this machine has no CUDA GPU that torch sees")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {options.device}: expected cpu or cuda")
    for flag, path in (("--csv", options.csv), ("--plot", options.plot)):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{flag} {path}: the folder {path.parent} does not exist")
    torch.set_num_threads(options.threads)
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(3), "little")
    # A file or a pipe has no width: give it one that holds the table.
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(describe_machine(device) + f" | seed {seed}", highlight=False, soft_wrap=True)
    seconds = options.seconds or DEFAULT_SECONDS[options.mode]
    if options.tune:
        return _tune(options, device, console, seed)
    if options.mode == "cpu-targets":
        if device.type != "cpu":
            raise UsageError("--mode cpu-targets measures the CPU: add --device cpu")
        run_targets(console, _progress(), seconds, seed)
        return 0
    cases = list(cases_of(options, device))
    variants = variants_of(options, cases)
    results, wrong, notes = measure_all(
        cases,
        variants,
        clocks_of(options, device),
        directions=PASSES[options.direction],
        seconds=seconds,
        seed=seed,
        progress=_progress(),
    )
    results = with_ratios(results)
    for reason in wrong:
        console.print(f"[bold red]left out:[/] {escape(reason)}", highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"not timed: {escape(note)}", highlight=False, soft_wrap=True)
    if options.csv is not None:
        write_csv(options.csv, results)
    if options.plot is not None:
        write_plot(options.plot, results, describe_machine(device))
    print_results(console, results)
    return 1 if wrong else 0


def _tune(options: argparse.Namespace, device: torch.device, console: Console, seed: int) -> int:
    cases = grid(device, shapes=options.shape or SHAPES)
    clocks = [CudaClock(device, graph) for graph in (True, False)]
    share = (options.seconds or TUNE_SECONDS) / len(cases)
    major, minor = torch.cuda.get_device_capability(device)
    try:
        run_tune(
            console,
            cases,
            measurer(clocks, share, seed),
            device="cuda",
            arch=10 * major + minor,
            device_name=torch.cuda.get_device_name(device),
            progress=_progress(),
        )
    except TuningError as error:
        console.print(f"[bold red]nothing is written:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


if __name__ == "__main__":
    sys.exit(main())
