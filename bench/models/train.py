"""A training step of a whole model: PEFT's, and two of this package.

    python bench/run.py --mode train              512+64 and 2048+64 tokens, about four minutes
    python bench/run.py --mode train --plot train.png --csv train.csv

This package runs the prefix without gradient, and then also keeps it between steps. A step is
forward and backward of one batch, without optimizer. Variants take turns, so that other load on the
machine affects all of them; the figure is the median. Loss and gradients are compared before
anything is timed. Peak memory is read in a separate process for each variant: the highest resident
size during a step, less the size with the model loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from torch import Tensor

from bench.common import flags, report
from bench.common.machine import describe_machine
from bench.common.statistics import ratio_spread
from bench.models.train_memory import peak_in_process, peak_of
from bench.models.train_report import VARIANTS, Figure, print_figures, write_plot
from bench.models.train_step import make_batch, make_model, make_step

LOSS_BOUND = 1e-5  # relative, float32
GRADIENT_BOUND = 1e-3  # relative to the gradient's norm, float32
Samples = Mapping[str, Sequence[float]]  # by variant, the seconds of each round


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = flags.make_parser("train", __doc__)
    add, positive = p.add_argument, flags.positive
    about = "tokens, comma-separated (default: 512,2048; with --plot 256,512,1024,2048)"
    add("--prompt", type=flags.numbers_above(0), help=about)
    add("--suffix", type=positive, default=64, help="tokens from the invocation on")
    add("--batch", type=positive, default=2, help="rows")
    add("--rank", type=positive, default=32, help="R")
    add("--layers", type=positive, default=10, help="of the model")
    add("--rounds", type=positive, default=5, help="timed steps of each variant")
    add("--chunk-size", type=positive, default=1024, help="prefix tokens at once")
    add("--accelerated", action="store_true", help="no_grad and cached on accelerate(model)")
    add("--no-memory", action="store_true", help="leave peak memory out")
    add("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    flags.add_threads(p, 2)
    flags.add_files(p, plot="seconds and memory over the prompt length")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit status."""
    return flags.run(parser(), arguments, _run)


def _run(o: argparse.Namespace) -> int:
    torch.set_num_threads(o.threads)
    if o.prompt is None:
        o.prompt = [256, 512, 1024, 2048] if o.plot else [512, 2048]
    if o.memory_of:
        print(json.dumps({"peak": peak_of(o)}))
        return 0
    console = report.make_console()
    machine = describe_machine(torch.device("cpu"))
    report.print_lines(console, machine)
    figures, spreads = _measure(o, console)
    print_figures(figures, console)
    report.warn_of_spread(console, spreads)
    if o.csv:
        report.write_csv(o.csv, figures)
        report.print_lines(console, f"csv: {o.csv}")
    if o.plot:
        write_plot(o.plot, figures, machine)
        report.print_lines(console, f"plot: {o.plot}")
    return 0


def _measure(o: argparse.Namespace, console: Console) -> tuple[list[Figure], dict[str, float]]:
    """All figures, and the spread of their ratios."""
    plain = make_model(o)
    served = plain
    if o.accelerated:
        from alora_kernels.peft import accelerate

        served = accelerate(make_model(o))
    models = {v: plain if v == "peft" else served for v in VARIANTS}
    count = sum(p.numel() for n, p in plain.named_parameters() if "lora_" not in n)
    report.print_lines(
        console,
        f"Llama from config, {count / 1e6:.1f}M parameters, float32, batch {o.batch}, rank "
        f"{o.rank} on all seven projections{', accelerated' if o.accelerated else ''}",
    )
    figures: list[Figure] = []
    spreads: dict[str, float] = {}
    with report.make_progress() as progress:
        bar = progress.add_task("", total=len(o.prompt) * len(VARIANTS) * (o.rounds + 1))

        def show(prompt: int, what: str) -> None:
            progress.update(bar, description=f"{prompt}+{o.suffix}: {what}")

        for prompt in o.prompt:
            batch = make_batch(o, prompt)
            steps = {v: make_step(models[v], batch, v, o.chunk_size) for v in VARIANTS}
            show(prompt, "checking")
            losses = _check(models, steps)
            wall: dict[str, list[float]] = {v: [] for v in VARIANTS}
            busy: dict[str, list[float]] = {v: [] for v in VARIANTS}
            for _ in range(o.rounds):
                for variant, step in steps.items():
                    show(prompt, variant)
                    models[variant].zero_grad(set_to_none=True)
                    began, used = time.perf_counter(), time.process_time()
                    step()
                    wall[variant].append(time.perf_counter() - began)
                    busy[variant].append(time.process_time() - used)
                    progress.advance(bar)
            del steps
            gc.collect()
            peaks: dict[str, float | None] = dict.fromkeys(VARIANTS)
            for variant in VARIANTS:
                if not o.no_memory:
                    show(prompt, f"memory {variant}")
                    peaks[variant] = peak_in_process(o, prompt, variant)
                progress.advance(bar)
            figures += [
                _figure(o, prompt, variant, wall, busy, peaks, losses[variant])
                for variant in VARIANTS
            ]
            spreads.update(_spreads(f"{prompt}+{o.suffix}", wall, busy))
    return figures, spreads


def _check(models: dict[str, Any], steps: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Compare loss and gradients of every variant with PEFT's. It warms the variants up, too."""
    losses: dict[str, float] = {}
    want: dict[str, Tensor] = {}
    for variant, step in steps.items():
        model = models[variant]
        model.zero_grad(set_to_none=True)
        losses[variant] = float(step())
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if variant == "peft":
            want = got
            continue
        off = abs(losses[variant] - losses["peft"]) / losses["peft"]
        if not off <= LOSS_BOUND:
            raise SystemExit(f"{variant}: the loss is off by {off:.1e} of PEFT's; nothing is timed")
        for name, reference in want.items():
            error = float((got[name] - reference).norm() / reference.norm())
            if not error <= GRADIENT_BOUND:
                raise SystemExit(f"{variant}: the gradient of {name} is off by {error:.1e}")
    return losses


def _figure(
    o: argparse.Namespace, prompt: int, variant: str, wall: Samples, busy: Samples,
    peaks: Mapping[str, float | None], loss: float,
) -> Figure:  # fmt: skip
    seconds, used = median(wall[variant]), median(busy[variant])
    peak, base = peaks[variant], peaks["peft"]
    return Figure(
        prompt=prompt,
        suffix=o.suffix,
        batch=o.batch,
        rank=o.rank,
        variant=variant,
        accelerated=o.accelerated and variant != "peft",
        seconds=seconds,
        fastest=min(wall[variant]),
        cpu_seconds=used,
        speedup=median(wall["peft"]) / seconds,
        cpu_speedup=median(busy["peft"]) / used,
        peak_mib=peak,
        peak_ratio=peak / base if peak is not None and base else None,
        loss=loss,
        rounds=o.rounds,
        threads=o.threads,
    )


def _spreads(length: str, wall: Samples, busy: Samples) -> dict[str, float]:
    return {
        f"{name} of {variant}, {length}": ratio_spread(samples["peft"], samples[variant])
        for name, samples in (("× PEFT", wall), ("× PEFT by CPU time", busy))
        for variant in VARIANTS
        if variant != "peft"
    }
