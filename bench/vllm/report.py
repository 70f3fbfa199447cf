"""How the vLLM benchmark shows its figures: as tables, in a csv file and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.common import report

# Where an invocation starts, and the plot's words for it.
STARTS = {"aligned": "on a block's edge", "worst": "at the worst offset"}


@dataclass(frozen=True)
class Row:
    """One context length with one start and block size. Times are in seconds.

    The fields are the columns of the csv file.
    """

    block_size: int
    start: str
    context: int
    rounds: int
    cached: int  # tokens of each aLoRA prompt that came from the cache
    hit_rate: float  # the cached fraction of all aLoRA requests' prompt tokens
    first_alora: float
    first_plain: float
    total_alora: float  # until the last token of one request
    total_plain: float
    base_turn: float
    together_alora: float | None  # until the last answer, all adapters sent at once
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
        """`together_ratio`, with the time of the base turn added to both sides."""
        if self.together_alora is None or self.together_plain is None:
            return None
        return (self.base_turn + self.together_plain) / (self.base_turn + self.together_alora)


@dataclass(frozen=True)
class Op:
    """The seconds of one layer's `add_lora_linear`."""

    layer: str
    rows: int
    ours: float
    stock: float


@dataclass(frozen=True)
class Base:
    """Base requests on two engines: medians in seconds, their ratio, its 95 % interval."""

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
    """Print the requests, all adapters at once, the LoRA ops, and the base requests."""
    columns = ("block", "start", "context", "cached", "hit rate", "first: aLoRA",
               "plain", "sooner", "end: aLoRA", "plain", "sooner")  # fmt: skip
    table = report.make_table("one request after a base turn, ms", columns, left=("start",))
    for r in rows:
        table.add_row(
            str(r.block_size), r.start, str(r.context), str(r.cached), f"{r.hit_rate:.1%}",
            _ms(r.first_alora), _ms(r.first_plain), _times(r.first_ratio),
            _ms(r.total_alora), _ms(r.total_plain), _times(r.total_ratio),
        )  # fmt: skip
    console.print(table)
    together = ("block", "start", "context", "base turn", "aLoRA", "plain", "sooner",
               "with the base turn")  # fmt: skip
    table = report.make_table("all adapters at once, ms", together, left=("start",))
    for r in rows:
        if r.together_alora is not None:
            table.add_row(
                str(r.block_size), r.start, str(r.context), _ms(r.base_turn),
                _ms(r.together_alora), _ms(r.together_plain), _times(r.together_ratio),
                _times(r.pipeline_ratio),
            )  # fmt: skip
    console.print(table)
    if ops:
        title = f"LoRA op, {ops[0].rows} tokens of one adapter, ms"
        table = report.make_table(title, ("layer", "ours", "vLLM's", "faster"), left=("layer",))
        whole = Op("all four", ops[0].rows, sum(p.ours for p in ops), sum(p.stock for p in ops))
        for op in (*ops, whole):
            table.add_row(op.layer, _ms(op.ours), _ms(op.stock), _times(op.stock / op.ours))
        console.print(table)
    if base is not None:
        report.print_lines(
            console,
            f"base requests, {base.requests} to each engine in turn: {_ms(base.with_plugin)} ms "
            f"with the plugin, {_ms(base.without)} ms without: {base.ratio:.3f} × "
            f"(95 %: {base.low:.3f} to {base.high:.3f})",
        )


def write_plot(path: Path, rows: Sequence[Row], served: str, machine: str) -> None:
    """Plot the time to the first token. Plain LoRA's is that of the first block size."""
    first = [r for r in rows if (r.block_size, r.start) == (rows[0].block_size, "aligned")]
    lines = {"plain LoRA": [(r.context, r.first_plain) for r in first]}
    for r in rows:
        name = f"aLoRA, start {STARTS[r.start]}, blocks of {r.block_size}"
        lines.setdefault(name, []).append((r.context, r.first_alora))
    title = "vLLM, after a base turn over the same context"
    with report.plot(path, title, notes=[served, machine], height=4.4) as (axis,):
        for colour, (name, points) in zip((report.GREY, *report.COLOURS), lines.items()):
            axis.plot(*zip(*points), "o-", color=colour, label=name)
        values = [value for points in lines.values() for _, value in points]
        report.over_lengths(axis, sorted({r.context for r in rows}), values)
        axis.set(xlabel="context, tokens", ylabel="seconds to the first token")
        axis.legend()
