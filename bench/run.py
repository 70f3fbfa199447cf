"""Throughput of masked-LoRA linear layers: this package, PEFT, the base linear, five lines by hand.

    python bench/run.py                                     the small models, under three minutes
    python bench/run.py --model Mistral-7B --active 0.1,0.5
    python bench/run.py --mode cpu-targets                  the package's CPU targets, measured
    python bench/run.py --mode host                         the host's part of a call
    python bench/run.py --tune                              measure this GPU for dispatch
    python bench/run.py --csv out.csv --plot out.png

docs/benchmark.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from cases import (
    DTYPES,
    MODELS,
    Case,
    Rows,
    layer_cases,
    make_tensors,
    rows_from_fraction,
    rows_from_text,
)
from check import check_all
from cpu_targets import run_targets
from machine import describe_machine
from measure import Clock, CpuClock, CudaClock, interleave
from report import Result, print_results, result_of, with_ratios, write_csv, write_plot
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tune import NO_GPU, SHAPES, TuningError, grid, measurer, run_tune
from variants import BaseLinear, ByHand, Package, PeftLayer, Variant

from alora_kernels.backends import STRATEGIES, Call, Projection
from alora_kernels.dispatch import BACKENDS, choose, problem_of

# Modes that stand in a module of their own beside this file, each with `main(arguments) -> int`.
OTHER_MODES = {
    "host": "host",
    "predict": "predict",
    "train": "train",
    "serve": "serve",
    "vllm": "vllm_serving",
}
MODES = ("layer", "cpu-targets", *OTHER_MODES)
PASSES = {"fwd": (False,), "fwd+bwd": (True,), "both": (False, True)}
# What two CPU cores measure within three minutes.
SMALL = {"Gemma-3-270M": tuple(MODELS["Gemma-3-270M"]), "Llama-3.2-3B": ("q,o", "k,v")}
DEFAULT_SECONDS = {"layer": 60.0, "cpu-targets": 150.0}
TUNE_SECONDS = 180.0


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = argparse.ArgumentParser(
        prog="bench/run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = p.add_argument
    add("--mode", choices=MODES, default="layer", help="what to measure (default: layer)")
    add("--model", type=_names(MODELS), help=f"comma-separated, or all: {', '.join(MODELS)}")
    add("--shape", type=_shapes, help="KxN[,KxN...]: layers of these sizes instead of a model's")
    add("--batch", type=_positive, help="sequences in a batch (default: 2, on a GPU 8)")
    add("--seq-len", type=_positive, help="tokens of a sequence (default: 512, on a GPU 1024)")
    add("--active", type=_active, default=["text"], help="text, or fractions such as 0.1,1")
    add("--rank", type=_positive, default=32, help="R (default: 32)")
    add("--dtype", type=_names(DTYPES), help="fp32, bf16, fp16 (default: fp32,bf16; GPU: bf16)")
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
    add("--threads", type=_positive, default=os.cpu_count() or 1, help="of the CPU")
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


class UsageError(Exception):
    """The flags ask for what cannot be done here."""


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
    cases = list(_cases(options, device))
    variants = _variants(options, cases)
    results, wrong, notes = measure_all(
        cases,
        variants,
        _clocks(options, device),
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


def measure_all(
    cases: Sequence[Case],
    variants: Sequence[Variant],
    clocks: Sequence[Clock],
    *,
    directions: Sequence[bool],
    seconds: float,
    seed: int,
    progress: Progress,
) -> tuple[list[Result], list[str], list[str]]:
    """Check and time every variant in every case.

    Returns the results, what was left out because its result was wrong, and what a clock could not
    time (a call that synchronises cannot become a CUDA graph), with the reasons.
    """
    results: list[Result] = []
    left_out: list[str] = []
    notes: list[str] = []
    share = seconds / (len(cases) * len(directions) * len(clocks))
    task = progress.add_task("measuring", total=len(cases) * len(directions) * len(clocks))
    with progress:
        for case in cases:
            progress.update(task, description=f"{case.model} {case.layer} {case.dtype_name}")
            tensors = make_tensors(case, seed)
            ways = [case.but(backward=backward) for backward in directions]
            wrong = check_all(variants, ways, tensors)
            left_out.extend(wrong.values())
            right = [v for v in variants if v.name not in wrong]
            for way in ways:
                with torch.set_grad_enabled(way.backward):
                    steps = {v.name: v.build(way, tensors) for v in right}
                    for clock in clocks:
                        timings, refused = interleave(steps, clock, seconds=share)
                        notes.extend(
                            f"{name}, {way.layer}, {way.pass_name}, {clock.launch}: {reason}"
                            for name, reason in refused.items()
                        )
                        results.extend(
                            result_of(way, v, clock.launch, timings[v.name])
                            for v in right
                            if v.name in timings
                        )
                        progress.advance(task)
    return results, left_out, notes


def _cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """The layers that the flags ask for."""
    gpu = device.type == "cuda"
    if options.shape is not None:
        if options.model is not None:
            raise UsageError("--shape and --model exclude each other")
        shapes = [("shapes", f"{i}x{o}", i, o) for i, o in options.shape]
    else:
        models = options.model or (list(MODELS) if gpu else list(SMALL))
        layers = {m: MODELS[m] for m in models} if options.model or gpu else SMALL
        shapes = [(m, name, *MODELS[m][name]) for m in models for name in layers[m]]
    batch = options.batch or (8 if gpu else 2)
    seq_len = options.seq_len or (1024 if gpu else 512)
    yield from layer_cases(
        shapes,
        [_rows(active, batch, seq_len, device) for active in options.active],
        rank=options.rank,
        dtypes=[DTYPES[name] for name in options.dtype or (["bf16"] if gpu else ["fp32", "bf16"])],
        adapter_dtype=torch.float32 if options.adapter_dtype == "fp32" else None,
    )


def _rows(active: str | float, batch: int, seq_len: int, device: torch.device) -> Rows:
    if active != "text":
        return rows_from_fraction(batch, seq_len, float(active), device)
    try:
        return rows_from_text(batch, seq_len, device)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _variants(options: argparse.Namespace, cases: Sequence[Case]) -> list[Variant]:
    """The base, this package in each way that can run, PEFT, and the lines by hand."""
    ours = []
    refusals = []
    backends = [b for b in BACKENDS if b != "reference"]
    backends = backends if options.backend == "all" else [options.backend]
    strategies = STRATEGIES if options.strategy == "all" else (options.strategy,)
    for backend in backends:
        for strategy in strategies:
            reason = _refusal(cases, backend, strategy)
            if reason is None:
                ours.append(Package(backend, strategy, options.adapter_precision))
            else:
                refusals.append(reason)
    if not ours:
        raise UsageError(
            f"--backend {options.backend} --strategy {options.strategy}: nothing can run here:\n"
            + "\n".join(refusals)
        )
    others: list[Variant] = [ByHand()]
    if not options.no_peft:
        if importlib.util.find_spec("peft") is None:
            raise UsageError("PEFT is not installed: pip install peft, or add --no-peft")
        others.insert(0, PeftLayer())
    return [BaseLinear(), *ours, *others]


def _refusal(cases: Sequence[Case], backend: str, strategy: str) -> str | None:
    """Why this package cannot run the cases this way, in its dispatcher's own words."""
    for case in cases:
        shape = case.in_features, case.out_features
        x = torch.empty(case.rows.num_rows, shape[0], dtype=case.dtype, device="meta")
        lora_a = torch.empty(case.rank, shape[0], dtype=case.adapter_dtype, device="meta")
        lora_b = torch.empty(shape[1], case.rank, dtype=case.adapter_dtype, device="meta")
        call = Call(case.rows.activation, (case.scaling,))
        problem = problem_of(call, x, [Projection(None, None, lora_a, lora_b, None)], False, True)
        try:
            choose(problem._replace(device=case.rows.activation.device.type), backend, strategy)
        except RuntimeError as error:
            return str(error)
    return None


def _clocks(options: argparse.Namespace, device: torch.device) -> list[Clock]:
    if device.type == "cpu":
        return [CpuClock()]
    graphs = {"both": (False, True), "on": (True,), "off": (False,)}[options.cuda_graphs]
    return [CudaClock(device, graph) for graph in graphs]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


# ---------------------------------------------------------------------- flags


def _names(known):
    def parse(text: str) -> list[str]:
        names = list(known) if text == "all" else text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"unknown name {name!r}; the names are {', '.join(known)}"
                )
        return names

    return parse


def _active(text: str) -> list[str | float]:
    values: list[str | float] = []
    for part in text.split(","):
        if part == "text":
            values.append(part)
            continue
        try:
            fraction = float(part)
        except ValueError:
            fraction = -1.0
        if not 0.0 <= fraction <= 1.0:
            raise argparse.ArgumentTypeError(
                f"expected 'text' or a fraction between 0 and 1, got {part!r}"
            )
        values.append(fraction)
    return values


def _shapes(text: str) -> list[tuple[int, int]]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected KxN[,KxN...] such as 2048x2048, got {text!r}")
    return [(int(k), int(n)) for k, n in (shape.split("x") for shape in text.split(","))]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
