"""Turns flags into layers, variants and clocks."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence

import torch

from alora_kernels.contract import STRATEGIES
from alora_kernels.dispatch import BACKENDS, choose
from bench.common import flags
from bench.common.clocks import Clock, CpuClock, CudaClock
from bench.common.machine import arch_of
from bench.layer.cases import (
    DTYPES,
    MODELS,
    Case,
    Rows,
    layer_cases,
    rows_from_fraction,
    rows_from_text,
)
from bench.layer.variants import BaseLinear, ByHand, Package, PeftLayer, Variant

# As much as two CPU cores can measure within three minutes.
SMALL = {"Gemma-3-270M": tuple(MODELS["Gemma-3-270M"]), "Llama-3.2-3B": ("q,o", "k,v")}


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """The layers that the flags ask for."""
    gpu = options.device.type == "cuda"
    if options.shape is not None:
        if options.model is not None:
            raise flags.UsageError("--shape and --model exclude each other")
        shapes = [("shapes", f"{i}x{o}", i, o) for i, o in options.shape]
    else:
        models = options.model or (list(MODELS) if gpu else list(SMALL))
        layers = {m: MODELS[m] for m in models} if options.model or gpu else SMALL
        shapes = [(m, name, *MODELS[m][name]) for m in models for name in layers[m]]
    batch = options.batch or (8 if gpu else 2)
    seq_len = options.seq_len or (1024 if gpu else 512)
    yield from layer_cases(
        shapes,
        [_rows(active, batch, seq_len, options.device) for active in options.active],
        rank=options.rank,
        dtypes=[DTYPES[name] for name in options.dtype or (["bf16"] if gpu else ["fp32", "bf16"])],
        adapter_dtype=torch.float32 if options.adapter_dtype == "fp32" else None,
    )


def _rows(active: str | float, batch: int, seq_len: int, device: torch.device) -> Rows:
    if active != "text":
        return rows_from_fraction(batch, seq_len, float(active), device)
    try:
        return rows_from_text(batch, seq_len, device)
    except ValueError as error:
        raise flags.UsageError(str(error)) from None


def variants_of(options: argparse.Namespace, cases: Sequence[Case]) -> list[Variant]:
    """The base, this package with each backend and strategy that can run, PEFT, and by hand."""
    ours = []
    refusals = []
    backends = [b for b in BACKENDS if b != "reference"]
    backends = backends if options.backend == "all" else [options.backend]
    strategies = STRATEGIES if options.strategy == "all" else (options.strategy,)
    for backend in backends:
        for strategy in strategies:
            reason = _refusal(cases, backend, strategy, options.device)
            if reason is None:
                ours.append(Package(backend, strategy, options.adapter_precision))
            else:
                refusals.append(reason)
    if not ours:
        raise flags.UsageError(
            f"--backend {options.backend} --strategy {options.strategy}: nothing can run here:\n"
            + "\n".join(refusals)
        )
    others: list[Variant] = [ByHand()]
    if not options.no_peft:
        if importlib.util.find_spec("peft") is None:
            raise flags.UsageError("PEFT is not installed: pip install peft, or add --no-peft")
        others.insert(0, PeftLayer())
    return [BaseLinear(), *ours, *others]


def _refusal(
    cases: Sequence[Case], backend: str, strategy: str, device: torch.device
) -> str | None:
    """Why this package cannot run the cases this way, in the words of its dispatcher."""
    for case in cases:
        try:
            choose(case.problem(device.type, arch_of(device), True), backend, strategy)
        except RuntimeError as error:
            return str(error)
    return None


def clocks_of(options: argparse.Namespace) -> list[Clock]:
    """The CPU's clock, or a GPU's with and without graphs."""
    if options.device.type == "cpu":
        return [CpuClock()]
    graphs = {"both": (False, True), "on": (True,), "off": (False,)}[options.cuda_graphs]
    return [CudaClock(options.device, graph) for graph in graphs]
