"""How figures are shown: tables, a csv file, plots of one style, and a warning of noise."""

from __future__ import annotations

import csv
import dataclasses
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.common.statistics import NOISY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# ---------------------------------------------------------------------- the terminal


def make_console() -> Console:
    """The standard output. A file or a pipe gets a width that all tables fit into."""
    return Console(width=None if sys.stdout.isatty() else 150)


def print_lines(console: Console, *lines: str) -> None:
    """Print plain lines. Above a table they say what runs, and on which machine."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def make_progress() -> Progress:
    """A progress bar on standard error, which is removed when the work is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def make_table(title: str, columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    """An empty table. The columns in `left` hold words, all others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def warn_of_spread(console: Console, spreads: Mapping[str, float]) -> None:
    """Warn when ratios spread too far to be believed. `spreads` has the ratios' names as keys."""
    noisy = {name: value for name, value in spreads.items() if value > NOISY}
    if not noisy:
        return
    worst = max(noisy, key=noisy.__getitem__)
    console.print("warning:", style="bold yellow", end=" ")
    print_lines(
        console,
        f"{len(noisy)} of {len(spreads)} ratios spread by more than {NOISY:.0%}, most of all "
        f"{worst} ({noisy[worst]:.0%}). Something else was using the machine: measure again, or "
        "longer.",
    )


# ---------------------------------------------------------------------- files


def write_csv(path: Path, *tables: Sequence[Any]) -> None:
    """Write all figures at full precision. A table is a list of one dataclass, and has a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for table in tables:
            if table:
                writer.writerow([field.name for field in dataclasses.fields(table[0])])
                writer.writerows(dataclasses.astuple(line) for line in table)


# ---------------------------------------------------------------------- plots

WIDTH = 9.0  # inches, of every plot: at 900 pixels, a letter of 8 points is 11 pixels high
SMALLEST = 8  # points
GREY = "#6b6b6b"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#111111")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": SMALLEST,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
    "lines.markersize": 4.5,
}


@contextmanager
def plot(
    path: Path, title: str, *, notes: Sequence[str], rows: int = 1, columns: int = 1,
    height: float = 3.6, shared_legend: bool = False,
) -> Iterator[list[Axes]]:  # fmt: skip
    """A figure of `rows` × `columns` panels. The caller draws on them; then the figure is saved.

    `notes` stand below the panels: what ran, and the machine with its commit.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, height * rows + 0.9), dpi=200, layout="constrained")
        panels: Any = figure.subfigures()  # separate from the title, which so stays above them
        axes = list(panels.subplots(rows, columns, squeeze=False).flat)
        figure.suptitle(title, fontsize=11, fontweight="bold", wrap=True)
        below = "\n".join(textwrap.fill(note, letters(SMALLEST)) for note in notes)
        figure.supxlabel(below, fontsize=SMALLEST, color=GREY)
        yield axes
        if shared_legend:
            handles, labels = axes[0].get_legend_handles_labels()
            longest = max(map(len, labels)) + 6  # letters, with the line or box in front
            fit = max(1, letters(SMALLEST) // longest)
            panels.legend(handles, labels, loc="outside upper center", ncols=fit)
        figure.savefig(path)


def over_lengths(axis: Axes, lengths: Sequence[int], values: Sequence[float]) -> None:
    """Make both axes logarithmic: ticks at the measured lengths on x, at 1, 2, 5, 10, ... on y."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_xlim(min(lengths) / 1.2, max(lengths) * 1.2)
    # The outermost ticks enclose the values, with room for the marks beside them.
    decades = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 2)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    lowest = max(tick for tick in ticks if tick <= min(values) / 1.25)
    highest = min(tick for tick in ticks if tick >= max(values) * 1.25)
    ticks = [tick for tick in ticks if lowest <= tick <= highest]
    axis.set_yscale("log")
    axis.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.set_ylim(lowest, highest)
    axis.minorticks_off()


def mark(axis: Axes, x: float, y: float, text: str, above: bool = True) -> None:
    """Write a word beside a point of a line."""
    axis.annotate(
        text,
        (x, y),
        fontsize=SMALLEST,
        textcoords="offset points",
        xytext=(0, 6 if above else -13),
        ha="center",
    )


def times(ratio: float) -> str:
    """A ratio as it is written into plots."""
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def letters(points: float, width: float = 72 * WIDTH) -> int:
    """How many letters of a size fit into a width for certain. Both are in points."""
    return int(width / (0.6 * points))
