"""aLoRA on stock vLLM: taking the base model's cached keys and values, or computing them again.

    python bench/run.py --mode vllm --engine-python ENV/bin/python    Gemma 3 270M
    python bench/run.py --mode vllm --csv vllm.csv --plot vllm.png    in that environment
    python bench/run.py --mode vllm --small --context 256             a tiny model, two minutes

The base model answers over a context. Then adapters of rank 32 run on context and answer, 16 tokens
each. The same tensors are served twice: as aLoRA, which takes the base model's cache up to its
start, and as plain LoRA, which computes the context again. Both run this package's CPU op. At
`aligned` the start is a multiple of the block size. At `worst` it is one token less, so the last
block is computed again.

Two more things are measured: vLLM's own CPU LoRA op against this package's on the same batch, and
base requests to two running engines, with the plugin and without.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.common import flags, report
from bench.common.machine import describe_machine
from bench.vllm.measure import Bench, spreads_of
from bench.vllm.models import INVOCATION_LENGTH, model_folder, write_adapters
from bench.vllm.report import STARTS, Base, Op, Row, print_tables, write_plot


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = flags.make_parser("vllm", __doc__)
    add, positive, numbers = p.add_argument, flags.positive, flags.numbers_above(0)
    add("--engine-python", default=sys.executable, help="the Python of vLLM's environment")
    add("--model", type=Path, help="a local folder (default: Gemma 3 270M of the extra [model])")
    add("--small", action="store_true", help="a tiny model from config")
    add("--context", type=numbers, default="1024,2048,4096", help="tokens, comma-separated")
    add("--block-size", type=numbers, default="128,32", help="tokens, comma-separated")
    add("--adapters", type=positive, default=5, help="how many")
    add("--tokens", type=positive, default=16, help="of each answer")
    add("--rank", type=positive, default=32, help="R")
    add("--targets", default="q_proj,k_proj,v_proj", help="adapted layers")
    add("--rounds", type=positive, default=2, help="of each variant")
    add("--requests", type=int, default=24, help="base requests to each engine; 0: none")
    add("--op-rows", type=int, default=1024, help="tokens of the LoRA ops' batch; 0: none")
    add("--cores", type=_cores, help="that an engine's threads are bound to (default: all)")
    add("--seed", type=int, default=0, help="of the prompts and adapters")
    flags.add_clock(p, condition="--cores with one core")
    flags.add_files(p, plot="the time to first token over the context length")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 if an answer on the cache differs from one from scratch."""
    return flags.run(parser(), arguments, _run)


def _run(o: argparse.Namespace) -> int:
    if o.clock == "cpu" and len(o.cores or os.sched_getaffinity(0)) > 1:
        raise flags.UsageError(
            "--clock cpu adds up a CPU's threads: it needs --cores with one core"
        )
    if 0 < o.requests < 20:
        raise flags.UsageError("--requests: at least 20, or 0; fewer say nothing about 2 %")
    uneven = any(context % block for context in o.context for block in o.block_size)
    if uneven or min(o.context) < 2 * max(o.block_size):
        raise flags.UsageError("--context: multiples of every block size, two blocks at least")
    if not _has_vllm(o.engine_python):
        raise flags.UsageError(
            f"--engine-python: no vLLM in the environment of {o.engine_python}; name the Python of "
            "one that has vLLM and this package"
        )
    with tempfile.TemporaryDirectory() as scratch:
        return _measure_all(o, report.make_console(), Path(scratch))


def _has_vllm(python: str) -> bool:
    """Whether vLLM is installed. It is not imported, since that takes many seconds."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-c", look], check=False).returncode == 0
    except OSError:
        return False


def _measure_all(o: argparse.Namespace, console: Console, scratch: Path) -> int:
    model = model_folder(o, scratch)
    bench = Bench(o, model, scratch)
    adapters = write_adapters(scratch, bench.sizes, o)
    rows: list[Row] = []
    ops: list[Op] = []
    base: Base | None = None
    spreads: dict[str, float] = {}
    steps = len(o.block_size) * len(STARTS) * len(o.context) + bool(o.op_rows) + bool(o.requests)
    with report.make_progress() as progress:
        task = progress.add_task("starting vLLM", total=steps)
        for number, block in enumerate(o.block_size):
            with bench.engine(adapters, block) as engine:
                if number == 0:
                    _head(o, console, engine.started)
                wrong = bench.check(engine)
                if wrong:
                    console.print(f"[red]{wrong}[/]", highlight=False)
                    return 1
                for context in o.context:
                    for start in STARTS:
                        where = f"{context} tokens, {start}, blocks of {block}"
                        progress.update(task, description=where)
                        row, samples = bench.measure(engine, context, start, number == 0)
                        rows.append(row)
                        spreads.update(spreads_of(samples, where))
                        progress.advance(task)
                if number == 0 and o.op_rows:
                    progress.update(task, description="LoRA ops")
                    ops = bench.measure_ops(engine)
                    progress.advance(task)
        if o.requests:
            progress.update(task, description="base requests")
            base, spread = bench.measure_base()
            spreads["base requests, with the plugin ÷ without"] = spread
            progress.advance(task)
    print_tables(console, rows, ops, base)
    report.warn_of_spread(console, spreads)
    if o.csv:
        report.write_csv(o.csv, rows, ops, [base] if base else [])
    if o.plot:
        write_plot(o.plot, rows, _served(o), describe_machine(torch.device("cpu")))
    return 0


def _served(o: argparse.Namespace) -> str:
    name = o.model or ("tiny model" if o.small else "Gemma 3 270M")
    return (
        f"{name}, float32, {o.adapters} adapters of rank {o.rank} on {o.targets}, answers of "
        f"{o.tokens} tokens"
    )


def _head(o: argparse.Namespace, console: Console, about: dict[str, Any]) -> None:
    bound = "; ".join(
        f"{t['threads']} threads bound to cores {t['cores']}" for t in about["threads"]
    )
    report.print_lines(
        console,
        describe_machine(torch.device("cpu")),
        f"vLLM {about['vllm']}, {bound}, at most {about['batched_tokens']} tokens a step",
        f"{_served(o)}, invocations of {INVOCATION_LENGTH}, {o.clock} time, seed {o.seed}",
    )


def _cores(text: str) -> list[int]:
    cores = flags.numbers_above(-1)(text)
    if not set(cores) <= os.sched_getaffinity(0):
        raise argparse.ArgumentTypeError(f"this machine has {sorted(os.sched_getaffinity(0))}")
    return cores
