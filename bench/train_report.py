"""What a training benchmark shows: its figures as a table, a csv and a plot."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

VARIANTS = ("peft", "no_grad", "cached")
# What this package means to reach, by (prompt, suffix): speed and peak memory against PEFT.
TARGETS = {
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
    speedup: float  # PEFT's median over this one
    cpu_speedup: float
    peak_mib: float | None
    peak_ratio: float | None
    loss: float
    rounds: int
    threads: int


def print_figures(figures: Sequence[Figure], console: Console) -> None:
    table = Table(title="training step (forward and backward), medians")
    for name in ("tokens", "variant", "s/step", "fastest", "× PEFT", "by CPU time", "peak MiB",
                 "of PEFT's", "loss", "target"):  # fmt: skip
        table.add_column(name, justify="left" if name == "variant" else "right")
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
    console.print(f"load average {load:.1f} on {os.cpu_count()} cores", highlight=False)


def _against_target(f: Figure) -> str:
    """What was meant to be reached; "missed" stands beside what was not."""
    speed, memory = TARGETS.get((f.prompt, f.suffix), {}).get(f.variant, (None, None))
    parts = []
    if speed is not None:
        parts.append(f"≥{speed:g}×" + ("" if f.speedup >= speed else " missed"))
    if memory is not None and f.peak_ratio is not None:
        parts.append(f"≤{memory}" + ("" if f.peak_ratio <= memory else " missed"))
    return ", ".join(parts)


def write_csv(path: Path, figures: Sequence[Figure]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        names = [field.name for field in dataclasses.fields(Figure)]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(f) for f in figures)


def write_plot(path: Path, figures: Sequence[Figure], machine: str) -> None:
    """Seconds a step and peak memory over the prompt length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with_memory = all(f.peak_mib is not None for f in figures)
    panels = 2 if with_memory else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4), squeeze=False)
    for variant, colour in zip(VARIANTS, ("#888888", "#2a7ab9", "#d1495b")):
        rows = sorted((f for f in figures if f.variant == variant), key=lambda f: f.prompt)
        x = [f.prompt for f in rows]
        label = "PEFT" if variant == "peft" else f"prefix={variant}"
        axes[0, 0].plot(x, [f.seconds for f in rows], "o-", color=colour, label=label)
        if variant != "peft":
            for f in rows:
                axes[0, 0].annotate(
                    f"{f.speedup:.1f}×",
                    (f.prompt, f.seconds),
                    fontsize=8,
                    textcoords="offset points",
                    xytext=(0, 6),
                    ha="center",
                )
        if with_memory:
            axes[0, 1].plot(x, [f.peak_mib for f in rows], "o-", color=colour, label=label)
    names = ("seconds a step", "peak memory over the model, MiB")
    for axis, name in zip(axes[0], names):
        axis.set(xlabel=f"prompt tokens (+ {figures[0].suffix} of the adapter)", ylabel=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.08)
        ticks = sorted({f.prompt for f in figures})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(
        "aLoRA training step: work before the invocation left out (×: times faster than PEFT)",
        fontsize=11,
    )
    figure.text(0.5, 0.01, machine, fontsize=6, ha="center", color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
