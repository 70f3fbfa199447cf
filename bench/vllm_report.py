"""What the vLLM benchmark shows: its figures as tables, a csv and a plot."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Where an invocation starts, and how the plot says it.
STARTS = {"aligned": "on a block's edge", "worst": "at the worst offset"}


@dataclass(frozen=True)
class Row:
    """One context length at one start and block size; the columns of the csv file. Seconds."""

    block_size: int
    start: str
    context: int
    rounds: int
    cached: int  # prompt tokens of each aLoRA request that came from the cache
    hit_rate: float  # of the prompt tokens of all aLoRA requests
    first_alora: float
    first_plain: float
    total_alora: float  # one request, to its last token
    total_plain: float
    base_turn: float
    together_alora: float | None  # all adapters sent at once
    together_plain: float | None

    @property
    def first_ratio(self) -> float:
        return self.first_plain / self.first_alora

    @property
    def total_ratio(self) -> float:
        return self.total_plain / self.total_alora

    @property
    def together_ratio(self) -> float | None:
        if self.together_alora is None or self.together_plain is None:
            return None
        return self.together_plain / self.together_alora

    @property
    def pipeline_ratio(self) -> float | None:
        """The same with the base turn, which both sides need."""
        if self.together_alora is None or self.together_plain is None:
            return None
        return (self.base_turn + self.together_plain) / (self.base_turn + self.together_alora)


@dataclass(frozen=True)
class Op:
    """One layer's `add_lora_linear`, seconds."""

    layer: str
    rows: int
    ours: float
    stock: float


@dataclass(frozen=True)
class Base:
    """Base requests on two engines: medians in seconds, and the ratio with its 95 % interval."""

    requests: int
    with_plugin: float
    without: float
    ratio: float
    low: float
    high: float


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.1f}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f} ×"


def print_tables(
    console: Console, rows: Sequence[Row], ops: Sequence[Op], base: Base | None
) -> None:
    table = Table(title="one request after a base turn, ms")
    for column in ("block", "start", "context", "cached", "hit rate", "first: aLoRA",
                   "plain", "sooner", "end: aLoRA", "plain", "sooner"):  # fmt: skip
        table.add_column(column, justify="left" if column == "start" else "right")
    for r in rows:
        table.add_row(
            str(r.block_size), r.start, str(r.context), str(r.cached), f"{r.hit_rate:.1%}",
            _ms(r.first_alora), _ms(r.first_plain), _times(r.first_ratio),
            _ms(r.total_alora), _ms(r.total_plain), _times(r.total_ratio),
        )  # fmt: skip
    console.print(table)
    table = Table(title="all adapters at once, ms")
    for column in ("block", "start", "context", "base turn", "aLoRA", "plain", "sooner",
                   "with the base turn"):  # fmt: skip
        table.add_column(column, justify="left" if column == "start" else "right")
    for r in rows:
        if r.together_alora is not None:
            table.add_row(
                str(r.block_size), r.start, str(r.context), _ms(r.base_turn),
                _ms(r.together_alora), _ms(r.together_plain), _times(r.together_ratio),
                _times(r.pipeline_ratio),
            )  # fmt: skip
    console.print(table)
    if ops:
        table = Table(title=f"LoRA op, {ops[0].rows} tokens of one adapter, ms")
        for column in ("layer", "ours", "vLLM's", "faster"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        whole = Op("all four", ops[0].rows, sum(p.ours for p in ops), sum(p.stock for p in ops))
        for op in (*ops, whole):
            table.add_row(op.layer, _ms(op.ours), _ms(op.stock), _times(op.stock / op.ours))
        console.print(table)
    if base is not None:
        console.print(
            f"base requests, {base.requests} to each engine in turn: {_ms(base.with_plugin)} ms "
            f"with the plugin, {_ms(base.without)} ms without: {base.ratio:.3f} × "
            f"(95 %: {base.low:.3f} to {base.high:.3f})",
            highlight=False,
            soft_wrap=True,
        )


def write_csv(path: Path, rows: Sequence[Row], ops: Sequence[Op], base: Base | None) -> None:
    """Three tables with a head each: requests, LoRA ops, base requests."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for kind, items in ((Row, rows), (Op, ops), (Base, [base] if base else [])):
            if items:
                writer.writerow([f.name for f in dataclasses.fields(kind)])
                writer.writerows(dataclasses.astuple(item) for item in items)


def write_plot(path: Path, rows: Sequence[Row], served: str, machine: str) -> None:
    """Time to first token over the context length; plain LoRA's at the first block size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.4, 4.8))
    mine = [r for r in rows if r.block_size == rows[0].block_size]
    aligned = [r for r in mine if r.start == "aligned"]
    axis.plot(
        [r.context for r in aligned], [r.first_plain for r in aligned], "o-", label="plain LoRA"
    )
    for block in dict.fromkeys(r.block_size for r in rows):
        for start in STARTS:
            points = [r for r in rows if (r.block_size, r.start) == (block, start)]
            axis.plot(
                [r.context for r in points], [r.first_alora for r in points], "o-",
                label=f"aLoRA, start {STARTS[start]}, blocks of {block}",
            )  # fmt: skip
    axis.set(xlabel="context, tokens", ylabel="seconds to the first token", yscale="log")
    axis.set_xscale("log", base=2)
    axis.set_xticks([r.context for r in aligned], [str(r.context) for r in aligned])
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle("vLLM, after a base turn over the same context")
    note = {"ha": "center", "color": "#555555"}
    figure.text(0.5, 0.915, served, fontsize=8, **note)
    figure.text(0.5, 0.01, machine, fontsize=6, **note)
    figure.tight_layout(rect=(0, 0.03, 1, 0.96))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
