"""What the serving benchmark shows: its figures as tables, a csv and a plot."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FIRST, ALL = "first token", "all answers"
OURS, BASE, PLAIN = "aLoRA on the base cache", "base forward of its tokens", "plain LoRA"
BATCH, ALONE = "aLoRA, one batch", "aLoRA, one by one"
PLAIN_ALONE, PLAIN_BATCH = "plain LoRA, one by one", "plain LoRA, batched"

# What this package means to reach with five adapters of rank 32 over Gemma 3 270M.
TARGET_CONTEXT = 2000
SOONER = {(FIRST, PLAIN): 32.0, (ALL, PLAIN_ALONE): 10.0}
OVER_BASE = 1.15


@dataclass(frozen=True)
class Row:
    """One variant at one context length; the columns of the csv file."""

    context: int
    what: str
    variant: str
    rounds: int
    median_s: float
    min_s: float
    ratio: float  # time over that of the first variant of the group
    over_base: float | None = None  # of OURS: its median over BASE's, and the 95 % interval
    over_base_low: float | None = None
    over_base_high: float | None = None


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """A table for each group, then the first token against the base's forward."""
    for what in (FIRST, ALL):
        table = Table(title=f"{what}, medians")
        for column in ("context", "variant", "rounds", "median", "min", "× the first", "target"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        mine = [r for r in rows if r.what == what]
        for i, row in enumerate(mine):
            if i and mine[i - 1].context != row.context:
                table.add_section()
            least = SOONER.get((what, row.variant)) if row.context == TARGET_CONTEXT else None
            table.add_row(
                str(row.context),
                row.variant,
                str(row.rounds),
                f"{1e3 * row.median_s:.1f} ms",
                f"{1e3 * row.min_s:.1f} ms",
                f"{row.ratio:.2f}",
                "" if least is None else f"≥ {least:g}" + _missed(row.ratio < least),
            )
        console.print(table)
    table = Table(title="first token ÷ base forward of the same tokens on that cache")
    for column in ("context", "pairs", "ratio", "95 % interval", "target"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.over_base is not None:
            table.add_row(
                str(row.context),
                str(row.rounds),
                f"{row.over_base:.3f}",
                f"{row.over_base_low:.3f} to {row.over_base_high:.3f}",
                f"≤ {OVER_BASE}" + _missed(row.over_base > OVER_BASE)
                if row.context == TARGET_CONTEXT
                else "",
            )
    console.print(table)


def _missed(missed: bool) -> str:
    return " missed" if missed else ""


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All figures at full precision, one line for each variant at each context length."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


GREY, BLUE, RED = "#888888", "#2a7ab9", "#d1495b"
PANELS = {FIRST: "Time to the first token", ALL: "Time to all answers"}
LINES: dict[str, tuple[str, str]] = {
    PLAIN: (GREY, "o-"),
    BASE: ("#222222", ":"),
    OURS: (RED, "o-"),
    PLAIN_ALONE: (GREY, "o-"),
    PLAIN_BATCH: (GREY, "o--"),
    ALONE: (BLUE, "o-"),
    BATCH: (RED, "o-"),
}
# Whose points say how much sooner than plain LoRA they are, and on which side of the line.
MARKED = {OURS: (PLAIN, 7), ALONE: (PLAIN_ALONE, 7), BATCH: (PLAIN_ALONE, -14)}


def write_plot(path: Path, rows: Sequence[Row], served: str, machine: str) -> None:
    """Seconds to the first token and to all answers over the context length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10.4, 4.4))
    for axis, (what, name) in zip(axes, PANELS.items()):
        _draw(axis, [r for r in rows if r.what == what])
        axis.set_title(name, fontsize=11)
    figure.suptitle("After a base turn over the same context (×: times sooner than plain LoRA)")
    note = {"ha": "center", "color": "#555555"}
    figure.text(0.5, 0.9, served, fontsize=9, **note)
    figure.text(0.5, 0.01, machine, fontsize=6, **note)
    figure.tight_layout(rect=(0, 0.03, 1, 0.93))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(axis: Any, rows: Sequence[Row]) -> None:
    seconds = {(r.variant, r.context): r.median_s for r in rows}
    contexts = sorted({r.context for r in rows})
    for variant, (colour, style) in LINES.items():
        points = [(c, seconds[variant, c]) for c in contexts if (variant, c) in seconds]
        if points:
            axis.plot(*zip(*points), style, color=colour, label=variant, markersize=5)
        if points and variant in MARKED:
            other, offset = MARKED[variant]
            for context, value in points:
                sooner = seconds[other, context] / value
                axis.annotate(
                    f"{sooner:.0f}×" if sooner >= 10 else f"{sooner:.1f}×",
                    (context, value),
                    fontsize=8,
                    textcoords="offset points",
                    xytext=(0, offset),
                    ha="center",
                )
    axis.set(xlabel="context, tokens", ylabel="seconds")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(contexts, [f"{c:,}" for c in contexts])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.08, y=0.14)
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
