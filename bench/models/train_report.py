"""How the training benchmark shows its figures: as a table, in a csv file and as a plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.common import report

VARIANTS = ("peft", "no_grad", "cached")
# The targets by (prompt, suffix): speed, and peak memory as a fraction of PEFT's.
TARGETS: dict[tuple[int, int], dict[str, tuple[float | None, float | None]]] = {
    (512, 64): {"no_grad": (2.3, None), "cached": (6.5, None)},
    (2048, 64): {"no_grad": (3.1, 0.24), "cached": (16.0, 0.18)},
}


@dataclass(frozen=True)
class Figure:
    """One variant at one length."""

    prompt: int
    suffix: int
    batch: int
    rank: int
    variant: str
    accelerated: bool
    seconds: float  # median of the wall time
    fastest: float
    cpu_seconds: float  # median of the processor time, all threads
    speedup: float  # PEFT's median over this variant's
    cpu_speedup: float
    peak_mib: float | None
    peak_ratio: float | None
    loss: float
    rounds: int
    threads: int


def print_figures(figures: Sequence[Figure], console: Console) -> None:
    """Print the table, with the targets of those lengths that have some."""
    words = ("variant", "target")
    columns = ("tokens", "variant", "s/step", "fastest", "× PEFT", "by CPU time", "peak MiB",
               "of PEFT's", "loss", "target")  # fmt: skip
    table = report.make_table("training step (forward and backward), medians", columns, left=words)
    last = None
    for f in figures:
        if last is not None and last != f.prompt:
            table.add_section()
        last = f.prompt
        table.add_row(
            f"{f.prompt}+{f.suffix}",
            f.variant + (" (accelerated)" if f.accelerated else ""),
            f"{f.seconds:.3f}",
            f"{f.fastest:.3f}",
            f"{f.speedup:.2f}",
            f"{f.cpu_speedup:.2f}",
            "" if f.peak_mib is None else f"{f.peak_mib:.0f}",
            "" if f.peak_ratio is None else f"{f.peak_ratio:.3f}",
            f"{f.loss:.6f}",
            _against_target(f),
        )
    console.print(table)
    load = os.getloadavg()[0]
    report.print_lines(console, f"load average {load:.1f} on {os.cpu_count()} cores")


def _against_target(f: Figure) -> str:
    """The target; "missed" stands beside one that is not met."""
    speed, memory = TARGETS.get((f.prompt, f.suffix), {}).get(f.variant, (None, None))
    parts = []
    if speed is not None:
        parts.append(f"≥{speed:g}×" + ("" if f.speedup >= speed else " missed"))
    if memory is not None and f.peak_ratio is not None:
        parts.append(f"≤{memory}" + ("" if f.peak_ratio <= memory else " missed"))
    return ", ".join(parts)


LINES = {"peft": (report.GREY, "PEFT"), "no_grad": (report.COLOURS[0], "prefix=no_grad"),
         "cached": (report.COLOURS[1], "prefix=cached")}  # fmt: skip


def write_plot(path: Path, figures: Sequence[Figure], machine: str) -> None:
    """Seconds a step and peak memory over the prompt length."""
    first = figures[0]
    what = f"a Llama from config, float32, batch {first.batch}, rank {first.rank}"
    panels = {"seconds a step": {(f.variant, f.prompt): f.seconds for f in figures}}
    if all(f.peak_mib for f in figures):
        name = "peak memory over the model, MiB"
        panels[name] = {(f.variant, f.prompt): f.peak_mib or 0.0 for f in figures}
    with report.plot(
        path,
        "aLoRA training step: work before the invocation left out (×: times faster than PEFT)",
        notes=[f"{what}, {first.rounds} rounds", machine],
        columns=len(panels),
    ) as axes:
        prompts = sorted({f.prompt for f in figures})
        for axis, (name, values) in zip(axes, panels.items()):
            for variant, (colour, label) in LINES.items():
                heights = [values[variant, prompt] for prompt in prompts]
                axis.plot(prompts, heights, "o-", color=colour, label=label)
            report.over_lengths(axis, prompts, list(values.values()))
            axis.set(xlabel=f"prompt tokens (+ {first.suffix} of the adapter)", ylabel=name)
            axis.legend()
        for f in figures:
            if f.variant != "peft":
                report.mark(axes[0], f.prompt, f.seconds, report.times(f.speedup))
