"""The figures of one layer, and how they are shown: in a csv file, as tables, as a plot."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bench.common import report
from bench.common.statistics import Timing, geometric_mean
from bench.layer.cases import Case
from bench.layer.variants import Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASE = "base linear"
PEFT = "PEFT"


@dataclass(frozen=True)
class Result:
    """One variant in one case; its fields are the columns of the csv file."""

    model: str
    layer: str
    batch: int
    seq_len: int
    in_features: int
    out_features: int
    rank: int
    active: str
    active_rows: int
    direction: str  # "fwd" or "fwd+bwd"
    dtype: str
    adapter_dtype: str
    variant: str
    adapter_precision: str
    launch: str  # "eager", or "graph" for a replayed CUDA graph
    rounds: int
    median_us: float
    spread: float  # interquartile range over the median
    min_us: float
    tokens_per_s: float
    gflop_per_s: float  # of the FLOPs that the result needs, not of those spent
    gbyte_per_s: float  # of the bytes of all operands and results, each once
    over_base: float | None = None  # its time over the base linear's
    peft_over: float | None = None  # PEFT's time over its time

    @property
    def panel(self) -> tuple[str, str, str]:
        """Results of one panel share a geometric mean, and a panel of the plot."""
        return self.direction, self.dtype, self.launch

    @property
    def cell(self) -> tuple[object, ...]:
        """What two results must have in common to be compared."""
        return (
            self.model,
            self.layer,
            self.in_features,
            self.out_features,
            self.active,
            self.direction,
            self.dtype,
            self.launch,
        )


def result_of(case: Case, variant: Variant, launch: str, timing: Timing) -> Result:
    """The figures of one timing. Ratios are added when all variants of the case are known."""
    return Result(
        model=case.model,
        layer=case.layer,
        batch=case.rows.batch,
        seq_len=case.rows.seq_len,
        in_features=case.in_features,
        out_features=case.out_features,
        rank=case.rank,
        active=case.rows.active,
        active_rows=case.rows.num_active,
        direction=case.pass_name,
        dtype=case.dtype_name,
        adapter_dtype=str(case.adapter_dtype).removeprefix("torch."),
        variant=variant.name,
        adapter_precision=variant.adapter_precision(case) if variant.adapted else "",
        launch=launch,
        rounds=timing.rounds,
        median_us=timing.median * 1e6,
        spread=timing.spread,
        min_us=timing.least * 1e6,
        tokens_per_s=case.rows.num_rows / timing.median,
        gflop_per_s=case.flops(variant.adapted) / timing.median * 1e-9,
        gbyte_per_s=case.bytes(variant.adapted) / timing.median * 1e-9,
    )


def with_ratios(results: Sequence[Result]) -> list[Result]:
    """The results, with ratios to the medians of the base and of PEFT in the same cell."""
    medians = {(r.cell, r.variant): r.median_us for r in results}
    out = []
    for r in results:
        base, peft = medians.get((r.cell, BASE)), medians.get((r.cell, PEFT))
        out.append(
            dataclasses.replace(
                r,
                over_base=None if base is None else r.median_us / base,
                peft_over=None if peft is None else peft / r.median_us,
            )
        )
    return out


# ---------------------------------------------------------------------- tables


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Print a table for each model with a section for each case, then the geometric means."""
    for (model, rank), group in itertools.groupby(results, lambda r: (r.model, r.rank)):
        _print_model(console, f"{model}, R={rank}", list(group))
    _print_means(console, results)


def _print_model(console: Console, title: str, results: list[Result]) -> None:
    words = ("layer", "rows (active)", "pass", "variant")
    figures = ("median ms", "±", "tokens/s", "GFLOP/s", "GB/s", "× base", "PEFT ÷")
    table = report.make_table(title, (*words, *figures), left=words)
    graphs = any(r.launch != "eager" for r in results)
    for _, cell in itertools.groupby(results, lambda r: r.cell):
        for number, r in enumerate(cell):
            labels = (
                f"{r.layer} {r.in_features}→{r.out_features}",
                f"{r.batch}×{r.seq_len} ({r.active_rows}, {r.active})",
                f"{r.direction} {r.dtype}" + (f" {r.launch}" if graphs else ""),
            )
            table.add_row(
                *(("", "", "") if number else labels),
                r.variant,
                f"{r.median_us / 1e3:.3f}",
                f"{r.spread:.0%}",
                f"{r.tokens_per_s:,.0f}",
                f"{r.gflop_per_s:,.0f}" if r.gflop_per_s >= 10 else f"{r.gflop_per_s:.1f}",
                f"{r.gbyte_per_s:.1f}",
                _ratio(r.over_base),
                _ratio(r.peft_over),
            )
        table.add_section()
    console.print(table)


def _print_means(console: Console, results: Sequence[Result]) -> None:
    words = ("pass", "variant")
    table = report.make_table("Geometric mean", (*words, "cases", "× base", "PEFT ÷"), left=words)
    for panel in dict.fromkeys(r.panel for r in results):
        mine = [r for r in results if r.panel == panel]
        for number, variant in enumerate(dict.fromkeys(r.variant for r in mine)):
            of = [r for r in mine if r.variant == variant]
            table.add_row(
                "" if number else " ".join(word for word in panel if word != "eager"),
                variant,
                str(len(of)),
                _ratio(geometric_mean(r.over_base for r in of)),
                _ratio(geometric_mean(r.peft_over for r in of)),
            )
        table.add_section()
    console.print(table)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# ---------------------------------------------------------------------- the plot

ROOM = 0.8  # how much of a group's width its bars take
NAMES = {"fwd": "forward", "fwd+bwd": "forward + backward"}


def write_plot(path: Path, results: Sequence[Result], machine: str) -> None:
    """Draw the time over the base linear as bars: a panel for each pass, dtype and launch."""
    shown = [r for r in results if r.variant != BASE and r.over_base is not None]
    if not shown:
        raise ValueError("--plot: nothing to draw, no variant beside the base linear was timed")
    panels = list(dict.fromkeys(r.panel for r in shown))
    variants = list(dict.fromkeys(r.variant for r in shown))
    label = _labels(shown)
    groups = list(dict.fromkeys(map(label, shown)))
    # Two panels beside each other, if their bars are then wide enough to carry figures.
    columns = 2 if len(panels) > 1 and _bar_points(2, groups, variants) >= report.SMALLEST else 1
    first = shown[0]
    size = f"{first.batch} × {first.seq_len} rows, R={first.rank}"
    with report.plot(
        path,
        "Time over the base linear (1.0 is the frozen nn.Linear; lower is better)",
        notes=[f"{', '.join(dict.fromkeys(r.model for r in shown))}; {size}", machine],
        rows=math.ceil(len(panels) / columns),
        columns=columns,
        height=3.8 if _upright(groups, columns) else 3.0,
        shared_legend=True,
    ) as axes:
        for axis, panel in itertools.zip_longest(axes, panels):
            if panel is None:
                axis.set_axis_off()
                continue
            mine = {(label(r), r.variant): r.over_base or 0.0 for r in shown if r.panel == panel}
            figures = _bar_points(columns, groups, variants) >= report.SMALLEST
            _draw_bars(axis, mine, groups, variants, figures)
            _name_groups(axis, groups, columns)
            direction, *rest = panel
            axis.set_title(", ".join([NAMES[direction], *(w for w in rest if w != "eager")]))
            axis.set_ylabel("× base")


def _labels(shown: Sequence[Result]) -> Callable[[Result], str]:
    """The label of a group of bars: its layer, and what else differs in this run."""
    models = len({r.model for r in shown}) > 1
    actives = len({r.active for r in shown}) > 1

    def label(r: Result) -> str:
        parts = [r.model if models else "", r.layer, r.active if actives else ""]
        return "\n".join(part for part in parts if part)

    return label


def _group_points(columns: int, groups: Sequence[str]) -> float:
    """The width of a group of bars in points. One or two groups leave room in a panel."""
    return 72 * 0.88 * report.WIDTH / columns / max(3, len(groups))


def _bar_points(columns: int, groups: Sequence[str], variants: Sequence[str]) -> float:
    return ROOM * _group_points(columns, groups) / len(variants)


def _draw_bars(
    axis: Axes, values: dict[tuple[str, str], float], groups: Sequence[str],
    variants: Sequence[str], figures: bool,
) -> None:  # fmt: skip
    """Draw a bar for each group and variant. With `figures` its value stands above it."""
    bar = ROOM / len(variants)
    for i, variant in enumerate(variants):
        places = [g + (i - (len(variants) - 1) / 2) * bar for g in range(len(groups))]
        heights = [values.get((group, variant), math.nan) for group in groups]
        bars = axis.bar(
            places, heights, bar, label=variant, color=report.COLOURS[i % len(report.COLOURS)]
        )
        if figures:
            texts = ["" if math.isnan(h) else f"{h:.2f}" for h in heights]
            axis.bar_label(bars, texts, fontsize=report.SMALLEST, rotation=90, padding=2)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_ylim(0, max(1.0, *values.values()) * 1.25)
    beside = max(0, 3 - len(groups)) / 2
    axis.set_xlim(-0.5 - beside, len(groups) - 0.5 + beside)


def _upright(groups: Sequence[str], columns: int) -> bool:
    """Whether the labels are too long to stand beside each other."""
    longest = max(len(line) for group in groups for line in group.split("\n"))
    return longest > report.letters(report.SMALLEST, _group_points(columns, groups))


def _name_groups(axis: Axes, groups: Sequence[str], columns: int) -> None:
    axis.set_xticks(range(len(groups)), groups, rotation=90 if _upright(groups, columns) else 0)
