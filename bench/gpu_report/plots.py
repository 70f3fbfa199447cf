"""The three plots of a report; one that has nothing to show is not drawn."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from bench.common import report as look
from bench.gpu_report.page import Report, data_of
from bench.layer.results import BASE, NAMES


def draw(report: Report, folder: Path, part: str) -> None:
    """Draw the plot that shows what `part` has measured, if there is one."""
    about = data_of(report, "environment")
    where = f"{about.get('gpu', 'unknown GPU')} | commit {about.get('commit')}"
    if report["rehearsal"]:
        where = f"REHEARSAL: sizes and times mean nothing | {where}"
    if part.startswith("layers"):
        _layers(report, folder / "layers.png", where)
    elif part == "tuning":
        _model(report, folder / "model.png", where)
    elif part in ("training", "session"):
        _whole(report, folder / "whole.png", where)


def _layers(report: Report, path: Path, where: str) -> None:
    parts = [n for n in report["parts"] if n.startswith("layers")]
    results = [r for n in parts for r in data_of(report, n).get("results", ())]
    results = [r for r in results if r["over_base"] is not None and r["variant"] != BASE]
    if not results:
        return
    # A call that no graph can hold is shown as it runs eagerly.
    captured = {r["variant"] for r in results if r["launch"] == "graph"}
    shown = [r for r in results if (r["launch"] == "graph") == (r["variant"] in captured)]
    actives = sorted({r["active"] for r in shown}, key=float)
    directions = list(dict.fromkeys(r["direction"] for r in shown))
    variants = list(dict.fromkeys(r["variant"] for r in shown))
    lengths = sorted({r["seq_len"] for r in shown})
    models = ", ".join(dict.fromkeys(r["model"] for r in shown))
    with look.plot(
        path, "Time over the base linear (lower is better)",
        notes=[f"{models}; medians over their layers, R={shown[0]['rank']}, bfloat16", where],
        rows=len(directions), columns=len(actives), shared_legend=True,
    ) as axes:  # fmt: skip
        places = [(d, a) for d in directions for a in actives]
        for axis, (direction, active) in zip(axes, places):
            here = [r for r in shown if (r["direction"], r["active"]) == (direction, active)]
            for i, variant in enumerate(variants):
                found = {
                    m: [
                        r["over_base"] for r in here if (r["variant"], r["seq_len"]) == (variant, m)
                    ]
                    for m in lengths
                }
                points = [(m, statistics.median(v)) for m, v in found.items() if v]
                # (No point, too, has a line: all panels share one legend.)
                axis.plot(
                    [m for m, _ in points], [y for _, y in points], marker="o", label=variant,
                    color=look.COLOURS[i % len(look.COLOURS)],
                )  # fmt: skip
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{m:,}" for m in lengths])
            axis.minorticks_off()
            axis.set_xlabel("rows M")
            axis.set_ylabel("× base")
            axis.set_title(f"{NAMES[direction]}, f = {active}")


def _model(report: Report, path: Path, where: str) -> None:
    lines = data_of(report, "tuning").get("lines", ())
    if not lines:
        return
    pairs = list(dict.fromkeys(pair for line in lines for pair in line["pairs"]))
    with look.plot(
        path, "Measured time over what the cost model expects (1 is the model)",
        notes=[f"{len(lines)} cases of tuning's grid, by measured time", where], height=4.2,
        shared_legend=True,
    ) as (axis,):  # fmt: skip
        for i, pair in enumerate(pairs):
            points: list[dict[str, Any]] = [x["pairs"][pair] for x in lines if pair in x["pairs"]]
            axis.scatter(
                [p["us"] for p in points], [p["us"] / p["model_us"] for p in points], s=14,
                label=pair, color=look.COLOURS[i % len(look.COLOURS)],
            )  # fmt: skip
        axis.axhline(1.0, color="black", linewidth=0.8)
        times = [p["us"] for line in lines for p in line["pairs"].values()]
        decades = range(math.floor(math.log10(min(times))), math.ceil(math.log10(max(times))) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axis.set_xlim(min(times) / 1.2, max(times) * 1.2)
        axis.minorticks_off()
        axis.set_xlabel("measured µs")
        axis.set_ylabel("measured ÷ expected")
        axis.set_ylim(bottom=0)


def _whole(report: Report, path: Path, where: str) -> None:
    variants = data_of(report, "training").get("variants", {})
    rows = data_of(report, "session").get("rows", ())
    if not variants and not rows:
        return
    panels: list[tuple[str, list[str], list[float]]] = []
    if variants:
        panels.append(
            ("a training step", list(variants), [v["seconds"] * 1e3 for v in variants.values()])
        )
    for context in dict.fromkeys(r["context"] for r in rows):
        mine = [r for r in rows if r["context"] == context]
        names = [f"{r['what']}: {r['variant']}" for r in mine]
        panels.append(
            (f"a session over {context:,} tokens", names, [r["seconds"] * 1e3 for r in mine])
        )
    with look.plot(
        path, "Whole models, milliseconds (lower is better)",
        notes=["a Llama of one billion parameters from its config", where], rows=len(panels),
        height=2.4,
    ) as axes:  # fmt: skip
        for axis, (title, names, values) in zip(axes, panels):
            bars = axis.barh(names, values, color=look.COLOURS[0])
            axis.bar_label(bars, [f"{v:,.1f}" for v in values], fontsize=look.SMALLEST, padding=2)
            axis.set_xlim(0, max(values) * 1.15)
            axis.invert_yaxis()
            axis.grid(False)
            axis.set_title(title)
