"""Checks every variant in every case, then times the variants in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.progress import Progress

from bench.common.clocks import Clock, interleave
from bench.common.statistics import Timing, ratio_spread
from bench.layer.cases import Case, make_tensors
from bench.layer.check import check_all
from bench.layer.results import BASE, PEFT, Result, result_of
from bench.layer.variants import Variant


@dataclass(frozen=True)
class Measured:
    """What was timed, and what was not, with the reasons."""

    results: list[Result] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # for a wrong result
    notes: list[str] = field(default_factory=list)  # for clocks that could not time them
    spreads: dict[str, float] = field(default_factory=dict)  # by the names of the ratios


def measure_all(
    cases: Sequence[Case],
    variants: Sequence[Variant],
    clocks: Sequence[Clock],
    *,
    directions: Sequence[bool],
    seconds: float,
    seed: int,
    progress: Progress,
) -> Measured:
    """Check and time every variant in every case. All of it takes about `seconds`."""
    measured = Measured()
    total = len(cases) * len(directions) * len(clocks)
    task = progress.add_task("measuring", total=total)
    with progress:
        for case in cases:
            progress.update(task, description=f"{case.model} {case.layer} {case.dtype_name}")
            tensors = make_tensors(case, seed)
            ways = [case.but(backward=backward) for backward in directions]
            wrong = check_all(variants, ways, tensors)
            measured.left_out.extend(wrong.values())
            right = [v for v in variants if v.name not in wrong]
            for way in ways:
                with torch.set_grad_enabled(way.backward):
                    steps = {v.name: v.build(way, tensors) for v in right}
                    for clock in clocks:
                        timings, refused = interleave(steps, clock, seconds=seconds / total)
                        where = f"{way.layer}, {way.dtype_name}, {way.pass_name}, {clock.launch}"
                        measured.notes.extend(
                            f"{name}, {where}: {reason}" for name, reason in refused.items()
                        )
                        measured.results.extend(
                            result_of(way, v, clock.launch, timings[v.name])
                            for v in right
                            if v.name in timings
                        )
                        measured.spreads.update(ratio_spreads(timings, where))
                        progress.advance(task)
    return measured


def ratio_spreads(timings: Mapping[str, Timing], where: str) -> dict[str, float]:
    """The spread over the rounds of each ratio in the tables."""
    spreads = {}
    for name, timing in timings.items():
        if BASE in timings and name != BASE:
            spread = ratio_spread(timing.samples, timings[BASE].samples)
            spreads[f"{name} × base, {where}"] = spread
        if PEFT in timings and name not in (BASE, PEFT):
            spread = ratio_spread(timings[PEFT].samples, timing.samples)
            spreads[f"PEFT ÷ {name}, {where}"] = spread
    return spreads
