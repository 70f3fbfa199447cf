"""What is shown: a table, the geometric means, a csv file, a plot."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import Case
from measure import Timing
from rich.console import Console
from rich.table import Table
from variants import Variant

BASE = "base linear"
PEFT = "PEFT"


@dataclass(frozen=True)
class Result:
    """One variant in one case; the columns of the csv file."""

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
    gflop_per_s: float  # the FLOPs that the result needs, not those that were spent
    gbyte_per_s: float  # the bytes of all operands and results, each once
    over_base: float | None = None  # time over the base linear's
    peft_over: float | None = None  # PEFT's time over this one's

    @property
    def cell(self) -> tuple[object, ...]:
        """What results that may be compared have in common."""
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
    """The figures of one timing; ratios come later, when all variants of the case are known."""
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
    """The results with their ratios of medians within each cell."""
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


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of those that exist, or None."""
    logs = [math.log(v) for v in values if v is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


# ---------------------------------------------------------------------- tables


def print_results(console: Console, results: Sequence[Result]) -> None:
    """One table for each model, a section for each case, then the geometric means."""
    for (model, rank), group in itertools.groupby(results, lambda r: (r.model, r.rank)):
        _print_model(console, f"{model}, R={rank}", list(group))
    _print_means(console, results)


def _print_model(console: Console, title: str, results: list[Result]) -> None:
    graphs = any(r.launch != "eager" for r in results)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("rows (active)", no_wrap=True)
    table.add_column("pass", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for name in ("median ms", "±", "tokens/s", "GFLOP/s", "GB/s", "× base", "PEFT ÷"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, cell in itertools.groupby(results, lambda r: r.cell):
        head = True
        for r in cell:
            launch = f" {r.launch}" if graphs else ""
            labels = (
                f"{r.layer} {r.in_features}→{r.out_features}",
                f"{r.batch}×{r.seq_len} ({r.active_rows}, {r.active})",
                f"{r.direction} {r.dtype}{launch}",
            )
            table.add_row(
                *(labels if head else ("", "", "")),
                r.variant,
                f"{r.median_us / 1e3:.3f}",
                f"{r.spread:.0%}",
                f"{r.tokens_per_s:,.0f}",
                f"{r.gflop_per_s:,.0f}" if r.gflop_per_s >= 10 else f"{r.gflop_per_s:.1f}",
                f"{r.gbyte_per_s:.1f}",
                _ratio(r.over_base),
                _ratio(r.peft_over),
            )
            head = False
        table.add_section()
    console.print(table)


def _print_means(console: Console, results: Sequence[Result]) -> None:
    table = Table(title="Geometric mean", title_justify="left", title_style="bold")
    table.add_column("pass", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    table.add_column("cases", justify="right")
    table.add_column("× base", justify="right")
    table.add_column("PEFT ÷", justify="right")
    for key in dict.fromkeys((r.direction, r.dtype, r.launch) for r in results):
        mine = [r for r in results if (r.direction, r.dtype, r.launch) == key]
        direction, dtype, launch = key
        head = f"{direction} {dtype}" + (f" {launch}" if launch != "eager" else "")
        for variant in dict.fromkeys(r.variant for r in mine):
            of = [r for r in mine if r.variant == variant]
            table.add_row(
                head,
                variant,
                str(len(of)),
                _ratio(geometric_mean(r.over_base for r in of)),
                _ratio(geometric_mean(r.peft_over for r in of)),
            )
            head = ""
        table.add_section()
    console.print(table)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# ---------------------------------------------------------------------- files


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """All figures at full precision, one line for each variant in each case."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Result)])
        for r in results:
            writer.writerow(["" if v is None else v for v in dataclasses.astuple(r)])


COLOURS = ("#2b6cb0", "#38a169", "#805ad5", "#dd6b20", "#d53f8c", "#718096")


def write_plot(path: Path, results: Sequence[Result], subtitle: str) -> None:
    """Bars of the time over the base linear: a panel for each pass and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in results if r.variant != BASE and r.over_base is not None]
    if not shown:
        raise ValueError("--plot: nothing to draw, no variant beside the base linear was timed")
    panels = list(dict.fromkeys((r.direction, r.dtype, r.launch) for r in shown))
    variants = list(dict.fromkeys(r.variant for r in shown))
    groups = list(dict.fromkeys(_group(r, shown) for r in shown))
    columns = 1 if len(panels) == 1 else 2
    lines = -(-len(panels) // columns)
    width = max(5.0, 1.0 + len(groups) * (0.22 * len(variants) + 0.25))
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(width * columns, 3.4 * lines + 0.8), squeeze=False, sharex=False
    )
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        if panel is None:
            axis.set_axis_off()
            continue
        mine = [r for r in shown if (r.direction, r.dtype, r.launch) == panel]
        _draw_panel(axis, panel, mine, variants, groups, lambda r: _group(r, shown))
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.suptitle("Time over the base linear (1.0 = the frozen nn.Linear; lower is better)")
    figure.text(0.5, 0.005, subtitle, ha="center", va="bottom", fontsize=6, color="#555555")
    figure.legend(
        handles,
        labels,
        loc="upper center",
        ncols=len(labels),
        frameon=False,
        bbox_to_anchor=(0.5, 1.0 - 0.32 / figure.get_figheight()),
    )
    figure.tight_layout(
        rect=(0, 0.25 / figure.get_figheight(), 1, 1 - 0.45 / figure.get_figheight())
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _group(r: Result, among: Sequence[Result]) -> str:
    """The label of a group of bars: the layer, and what else differs in this run."""
    label = r.layer
    if len({other.model for other in among}) > 1:
        label = f"{r.model}\n{label}"
    if len({other.active for other in among}) > 1:
        label = f"{label}\n{r.active}"
    return label


def _draw_panel(
    axis,
    panel: tuple[str, str, str],
    results: Sequence[Result],
    variants: Sequence[str],
    groups: Sequence[str],
    group_of: Callable[[Result], str],
) -> None:
    direction, dtype, launch = panel
    bar = 0.8 / len(variants)
    highest = max(r.over_base for r in results)
    for i, variant in enumerate(variants):
        of = {group_of(r): r.over_base for r in results if r.variant == variant}
        at = [g + (i - (len(variants) - 1) / 2) * bar for g in range(len(groups))]
        heights = [of.get(group, math.nan) for group in groups]
        axis.bar(at, heights, bar, label=variant, color=COLOURS[i % len(COLOURS)])
        for place, height in zip(at, heights):
            if not math.isnan(height):
                axis.text(
                    place,
                    height + 0.01 * highest,
                    f"{height:.2f}",
                    ha="center",
                    va="bottom",
                    fontsize=6,
                    rotation=90,
                )
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_ylim(0, highest * 1.18)
    axis.set_xticks(range(len(groups)), groups, fontsize=6)
    axis.set_ylabel("× base")
    names = {"fwd": "forward", "fwd+bwd": "forward + backward"}
    axis.set_title(f"{names[direction]}, {dtype}" + (f", {launch}" if launch != "eager" else ""))
    axis.spines[["top", "right"]].set_visible(False)
