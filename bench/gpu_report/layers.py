"""Layers of real models, and tuning's grid: checked, then timed, until the time is over."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.progress import Progress

from bench.common.machine import arch_of
from bench.gpu_report.context import Context, LeftOut
from bench.layer import tune
from bench.layer.cases import MODELS, Case, layer_cases, rows_from_fraction
from bench.layer.measure import measure_all
from bench.layer.results import with_ratios
from bench.layer.selection import variants_of

# What tells most comes first: the time may end before the list does.
ROWS: tuple[tuple[int, float], ...] = (
    (8192, 0.1),
    (8192, 1.0),
    (16, 1.0),
    (256, 1.0),
    (1, 1.0),
    (256, 0.1),
    (16, 0.1),
)
LAYERS = ("q,o", "gate,up", "down", "k,v")
RANK, SEED = 32, 1
CASE_SECONDS = 0.4  # of timing, for each direction and clock


def _cases(context: Context, model: str) -> Iterator[Case]:
    layers, rows = MODELS[model], ROWS
    names: tuple[str, ...] = LAYERS
    if context.rehearsal:
        layers, names, rows = {"q,o": (64, 96)}, ("q,o",), ((1, 1.0), (16, 0.1), (16, 1.0))
    shapes = [(model, name, *layers[name]) for name in names]
    for m, fraction in rows:
        batch = [rows_from_fraction(1, m, fraction, context.device)]
        yield from layer_cases(
            shapes, batch, rank=4 if context.rehearsal else RANK, dtypes=[torch.bfloat16],
            adapter_dtype=torch.float32,
        )  # fmt: skip


def layers_of(model: str) -> Callable[[Context], None]:
    """The part that measures the layers of a model."""

    def part(context: Context) -> None:
        cases = list(_cases(context, model))
        peft = importlib.util.find_spec("peft") is not None
        asked = Namespace(
            backend="all", strategy="all", adapter_precision="compute", no_peft=not peft,
            device=context.device,
        )  # fmt: skip
        variants = variants_of(asked, cases)
        context.save(
            variants=[v.name for v in variants], results=[], wrong=[], notes=[], errors=[], left=0
        )
        spent, clocks = 0.0, context.clocks
        for number, case in enumerate(cases):
            if context.left < 1.2 * spent:
                context.save(left=len(cases) - number)
                return
            began = time.monotonic()
            try:
                measured = measure_all(
                    [case], variants, clocks, directions=(False, True), seed=SEED,
                    seconds=0.0 if context.rehearsal else 2 * CASE_SECONDS * len(clocks),
                    progress=Progress(disable=True),
                )  # fmt: skip
            except Exception as error:  # the other cases may go well
                what = f"{case.layer} M={case.rows.num_rows}: {type(error).__name__}: {error}"
                context.save(errors=[*context.data["errors"], what])
                context.wait()  # raises where the device is lost
                continue
            lines = [dataclasses.asdict(r) for r in with_ratios(measured.results)]
            context.save(
                results=[*context.data["results"], *lines],
                wrong=[*context.data["wrong"], *measured.left_out],
                notes=[*context.data["notes"], *measured.notes],
            )
            spent = max(spent, time.monotonic() - began)

    return part


def tuning(context: Context) -> None:
    """What `--tune` measures, without writing the file that dispatch reads."""
    device = context.device
    if device.type == "cpu" and not context.rehearsal:
        raise LeftOut("tuning needs a GPU")
    arch = arch_of(device)
    small = {"shapes": ((64, 96),), "rows": ((1, 1.0), (32, 0.5)), "ranks": (4,)}
    cases = tune.grid(device, **small) if context.rehearsal else tune.grid(device)  # type: ignore[arg-type]
    seconds = 0.0 if context.rehearsal else 0.5 * context.seconds / len(cases)
    measure = tune.measurer(context.clocks, seconds, SEED)
    context.save(cases=len(cases), lines=[], errors=[])
    spent = 0.0
    for case in cases:
        if context.left < 1.2 * spent:
            return
        began = time.monotonic()
        quiet = Progress(disable=True)
        try:
            lines = tune.tune([case], measure, arch, quiet, device.type)
        except Exception as error:
            context.save(errors=[*context.data["errors"], f"{type(error).__name__}: {error}"])
            context.wait()
            continue
        context.save(lines=[*context.data["lines"], *map(_told, lines)])
        spent = max(spent, time.monotonic() - began)


def _told(line: tune.Line) -> dict[str, Any]:
    case = line.case
    return {
        "rows": case.rows.num_rows, "active": case.rows.num_active, "rank": case.rank,
        "in_features": case.in_features, "out_features": case.out_features,
        "pass": case.pass_name, "picked": "/".join(line.picked), "fastest": "/".join(line.fastest),
        "loss": line.loss - 1.0,
        "pairs": {
            "/".join(pair): {"us": t.median * 1e6, "model_us": line.expected[pair] * 1e6}
            for pair, t in line.measured.items()
        },
    }  # fmt: skip
