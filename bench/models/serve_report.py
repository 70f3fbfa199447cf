"""How the serving benchmark shows its figures: as tables, in a csv file and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bench.common import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST, ALL = "first token", "all answers"
OURS, BASE, PLAIN = "aLoRA on the base cache", "base forward of its tokens", "plain LoRA"
BATCH, ALONE = "aLoRA, one batch", "aLoRA, one by one"
PLAIN_ALONE, PLAIN_BATCH = "plain LoRA, one by one", "plain LoRA, batched"

# The targets of this package, for five adapters of rank 32 on Gemma 3 270M.
TARGET_CONTEXT = 2000
SOONER = {(FIRST, PLAIN): 32.0, (ALL, PLAIN_ALONE): 10.0}
OVER_BASE = 1.15


@dataclass(frozen=True)
class Row:
    """One variant at one context length; its fields are the columns of the csv file."""

    context: int
    what: str
    variant: str
    rounds: int
    median_s: float
    min_s: float
    ratio: float  # of its time to that of the group's first variant
    over_base: float | None = None  # only of OURS: its median over BASE's, with its 95 % interval
    over_base_low: float | None = None
    over_base_high: float | None = None


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Print a table for each group, then the ratio of the first token to the base's forward."""
    for what in (FIRST, ALL):
        columns = ("context", "variant", "rounds", "median", "min", "× the first", "target")
        table = report.make_table(f"{what}, medians", columns, left=("variant",))
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
    title = "first token ÷ base forward of the same tokens on that cache"
    table = report.make_table(title, ("context", "pairs", "ratio", "95 % interval", "target"))
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


PANELS = {FIRST: "Time to the first token", ALL: "Time to all answers"}
BLUE, RED = report.COLOURS[:2]
LINES: dict[str, tuple[str, str]] = {
    PLAIN: (report.GREY, "o-"),
    BASE: ("#222222", "o:"),
    OURS: (RED, "o-"),
    PLAIN_ALONE: (report.GREY, "o-"),
    PLAIN_BATCH: (report.GREY, "o--"),
    ALONE: (BLUE, "o-"),
    BATCH: (RED, "o-"),
}
# Lines whose points show the ratio of another line to them, and whether it stands above.
MARKED = {OURS: (PLAIN, True), ALONE: (PLAIN_ALONE, True), BATCH: (PLAIN_ALONE, False)}


def write_plot(path: Path, rows: Sequence[Row], served: str, machine: str) -> None:
    """Seconds to the first token and to all answers over the context length."""
    with report.plot(
        path,
        "After a base turn over the same context (×: times sooner than plain LoRA)",
        notes=[served, machine],
        columns=2,
    ) as axes:
        for axis, (what, name) in zip(axes, PANELS.items()):
            _draw(axis, [r for r in rows if r.what == what])
            axis.set_title(name)


def _draw(axis: Axes, rows: Sequence[Row]) -> None:
    seconds = {(r.variant, r.context): r.median_s for r in rows}
    contexts = sorted({r.context for r in rows})
    for variant, (colour, style) in LINES.items():
        points = [(c, seconds[variant, c]) for c in contexts if (variant, c) in seconds]
        if points:
            axis.plot(*zip(*points), style, color=colour, label=variant)
        if points and variant in MARKED:
            other, above = MARKED[variant]
            for context, value in points:
                report.mark(
                    axis, context, value, report.times(seconds[other, context] / value), above
                )
    report.over_lengths(axis, contexts, list(seconds.values()))
    axis.set(xlabel="context, tokens", ylabel="seconds")
    axis.legend()
