"""aLoRA on stock vLLM: the base model's cached keys and values against computing them again.

    python bench/run.py --mode vllm --engine-python ENV/bin/python    Gemma 3 270M
    python bench/run.py --mode vllm --csv vllm.csv --plot vllm.png    in that environment
    python bench/run.py --mode vllm --small --context 256             a tiny model, two minutes

The base model answers over a context; then adapters of rank 32 run on context and answer, 16 tokens
each. The same tensors are served as aLoRA, which takes the base model's cache up to its start, and
as plain LoRA, which computes the context again. Both run this package's CPU op. `aligned`: the
start is a multiple of the block size; `worst`: one token less, so the last block is recomputed.

Also: vLLM's own CPU LoRA op against this package's at the same batch, and base requests on two live
engines, with the plugin and without.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from bench.common import flags, report
from bench.common.machine import describe_machine
from bench.common.statistics import ratio_interval, ratio_spread
from bench.vllm.engine import Engine, Request
from bench.vllm.models import INVOCATION_LENGTH, layers_of, model_folder, write_adapters
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
    """Measure and print. Returns 1 when an answer on the cache is not that from scratch."""
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
    """Looked up, not imported: that takes many seconds."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-c", look], check=False).returncode == 0
    except OSError:
        return False


def _measure_all(o: argparse.Namespace, console: Console, scratch: Path) -> int:
    model = model_folder(o, scratch)
    sizes = json.loads((model / "config.json").read_text())
    adapters = write_adapters(scratch, sizes, o)
    rows: list[Row] = []
    ops: list[Op] = []
    base: Base | None = None
    spreads: dict[str, float] = {}
    steps = len(o.block_size) * len(STARTS) * len(o.context) + bool(o.op_rows) + bool(o.requests)
    with report.make_progress() as progress:
        task = progress.add_task("starting vLLM", total=steps)
        for number, block in enumerate(o.block_size):
            with _engine(o, model, scratch, adapters, block) as engine:
                if number == 0:
                    _head(o, console, engine.started)
                wrong = check(engine, o, sizes)
                if wrong:
                    console.print(f"[red]{wrong}[/]", highlight=False)
                    return 1
                for context in o.context:
                    for start in STARTS:
                        where = f"{context} tokens, {start}, blocks of {block}"
                        progress.update(task, description=where)
                        row, samples = measure(engine, o, sizes, context, start, number == 0)
                        rows.append(row)
                        spreads.update(spreads_of(samples, where))
                        progress.advance(task)
                if number == 0 and o.op_rows:
                    progress.update(task, description="LoRA ops")
                    ops = measure_ops(engine, o, sizes)
                    progress.advance(task)
        if o.requests:
            progress.update(task, description="base requests")
            base, spread = measure_base(o, model, scratch, sizes)
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


@contextlib.contextmanager
def _engine(
    o: argparse.Namespace,
    model: Path,
    scratch: Path,
    adapters: dict[str, str],
    block: int,
    plugin: bool = True,
) -> Iterator[Engine]:
    with Engine(
        o.engine_python,
        model,
        adapters=adapters,
        rank=o.rank,
        targets=o.targets.split(","),
        block_size=block,
        max_len=max(o.context) + 64,
        cores=o.cores or sorted(os.sched_getaffinity(0)),
        log=scratch / f"engine-{block}-{plugin}.log",
        plugin=plugin,
        clock=o.clock,
    ) as engine:
        yield engine


# ---------------------------------------------------------------------- what is measured

Times = dict[str, list[float]]  # seconds by what was timed: "first a" is aLoRA's, "first p" plain


def _prompt(o: argparse.Namespace, sizes: dict[str, Any], length: int, salt: object) -> list[int]:
    draw = random.Random(f"{o.seed} {length} {salt}")
    return [draw.randrange(20 + o.adapters, sizes["vocab_size"] - 1) for _ in range(length)]


def _turn(engine: Engine, o: argparse.Namespace, ids: list[int]) -> tuple[list[int], float]:
    """The base model's answer after `ids`, and its time.

    One token more is generated than is used, as a chat ends in an end-of-turn token: the keys and
    values of a token exist once it was fed.
    """
    (answer,) = engine.run([Request(ids, None, o.tokens + 1)])
    return [*ids, *answer.ids[: o.tokens]], answer.total


def _requests(o: argparse.Namespace, ids: list[int], kind: str) -> list[Request]:
    """The adapters' requests; `kind` is "a" (aLoRA) or "p" (plain LoRA)."""
    return [
        Request([*ids, *[10 + i] * INVOCATION_LENGTH], f"{kind}{i}", o.tokens)
        for i in range(o.adapters)
    ]


def check(engine: Engine, o: argparse.Namespace, sizes: dict[str, Any]) -> str | None:
    """What is wrong with the answers, if anything; warms the engine up as well."""
    block = engine.started["block_size"]
    engine.reset()
    ids, _ = _turn(engine, o, _prompt(o, sizes, 2 * block, "check"))
    requests = _requests(o, ids, "a")
    warm = engine.run(requests)
    plain = engine.run(_requests(o, ids, "p"))
    for request, answer, other in zip(requests, warm, plain):
        engine.reset()
        (cold,) = engine.run([request])
        if answer.cached != len(ids) // block * block or cold.cached or other.cached:
            return (
                f"{request.adapter}: {answer.cached} tokens from the cache after a base turn of "
                f"{len(ids)} in blocks of {block}, {cold.cached} from an empty cache, and "
                f"{other.cached} for the plain LoRA"
            )
        if answer.ids[0] != cold.ids[0]:
            return f"{request.adapter}: {answer.ids} on the cache, {cold.ids} from scratch"
    return None


def measure(
    engine: Engine,
    o: argparse.Namespace,
    sizes: dict[str, Any],
    context: int,
    start: str,
    together: bool,
) -> tuple[Row, Times]:
    """One row of medians over interleaved rounds, and the seconds of the rounds."""
    times: Times = {}
    cached: list[int] = []
    asked = 0

    def note(what: str, *seconds: float) -> None:
        times.setdefault(what, []).extend(seconds)

    length = context - (start == "worst")
    for number in range(o.rounds):
        ids = _prompt(o, sizes, length - o.tokens, number)
        engine.reset()
        ids, seconds = _turn(engine, o, ids)
        note("base", seconds)
        for request in _requests(o, ids, "a"):
            (answer,) = engine.run([request])
            note("first a", answer.first)
            note("total a", answer.total)
            cached.append(answer.cached)
            asked += len(request.ids)
        (answer,) = engine.run(_requests(o, ids, "p")[:1])
        note("first p", answer.first)
        note("total p", answer.total)
        if together:
            engine.reset()
            again, seconds = _turn(engine, o, ids[: length - o.tokens])
            note("base", seconds)
            note("all a", max(a.total for a in engine.run(_requests(o, again, "a"))))
            engine.reset()
            note("all p", max(a.total for a in engine.run(_requests(o, again, "p"))))
    of = {what: median(samples) for what, samples in times.items()}
    row = Row(
        block_size=engine.started["block_size"],
        start=start,
        context=context,
        rounds=o.rounds,
        cached=min(cached),
        hit_rate=sum(cached) / asked,
        first_alora=of["first a"],
        first_plain=of["first p"],
        total_alora=of["total a"],
        total_plain=of["total p"],
        base_turn=of["base"],
        together_alora=of.get("all a"),
        together_plain=of.get("all p"),
    )
    return row, times


def spreads_of(times: Times, where: str) -> dict[str, float]:
    """How far the ratios of plain LoRA over aLoRA spread."""
    names = {"first": "first token", "total": "one request", "all": "all adapters"}
    return {
        f"{name}, plain ÷ aLoRA, {where}": ratio_spread(times[f"{key} p"], times[f"{key} a"])
        for key, name in names.items()
        if f"{key} p" in times
    }


def measure_ops(engine: Engine, o: argparse.Namespace, sizes: dict[str, Any]) -> list[Op]:
    """vLLM's CPU op against ours, each layer, on a prefill of one adapter."""
    layers = layers_of(sizes)
    threads = engine.started["threads"][0]["threads"]
    found = engine.ask(
        do="ops", rows=o.op_rows, shapes=list(layers.values()), rank=o.rank, repeats=5,
        threads=threads,
    )  # fmt: skip
    for layer, figures in zip(layers, found):
        if figures["difference"] > 1e-5:
            raise RuntimeError(f"{layer}: the two ops differ by {figures['difference']:.1e}")
    return [Op(n, o.op_rows, f["ours"], f["stock"]) for n, f in zip(layers, found)]


def measure_base(
    o: argparse.Namespace, model: Path, scratch: Path, sizes: dict[str, Any]
) -> tuple[Base, float]:
    """Base requests to two live engines in turn, one idle while the other works.

    Returns the medians, and how far their ratio spreads.
    """
    block = o.block_size[0]
    pairs: list[tuple[float, float]] = []
    with (
        _engine(o, model, scratch, {}, block) as ours,
        _engine(o, model, scratch, {}, block, plugin=False) as stock,
    ):
        for number in range(-2, o.requests):
            ids = _prompt(o, sizes, 2 * block, f"base {number}")
            order = (ours, stock) if number % 2 else (stock, ours)
            seconds = {e is ours: e.run([Request(ids, None, o.tokens)])[0] for e in order}
            if seconds[True].ids != seconds[False].ids:
                raise RuntimeError(f"base request {number}: other tokens with the plugin")
            if number >= 0:  # the first two warm up
                pairs.append((seconds[True].total, seconds[False].total))
    low, high = ratio_interval(pairs, o.seed)
    ours_s, stock_s = zip(*pairs)
    base = Base(
        requests=len(pairs),
        with_plugin=median(ours_s),
        without=median(stock_s),
        ratio=median(ours_s) / median(stock_s),
        low=low,
        high=high,
    )
    return base, ratio_spread(ours_s, stock_s)


def _cores(text: str) -> list[int]:
    cores = flags.numbers_above(-1)(text)
    if not set(cores) <= os.sched_getaffinity(0):
        raise argparse.ArgumentTypeError(f"this machine has {sorted(os.sched_getaffinity(0))}")
    return cores
