"""Decode overhead on the CPU: one token through many small layers, all seven modules adapted.

    python bench/run.py --mode decode [--seconds 20] [--csv decode.csv]

The layers are so small that the time is mostly the host's own work for each layer. Four models with
the same weights run in turn: the base, PEFT's plain LoRA, PEFT's aLoRA (which gets its offsets in
every step; without them it is off), and the aLoRA accelerated by this package. Each sample decodes
a few tokens on a copy of one prefilled cache. The clock is the thread's own processor time. On a
machine that does nothing else it equals wall-clock time, and on a busy one it can still be
compared.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console

from alora_kernels import accelerate
from bench.common import flags, report
from bench.common.machine import describe_machine
from bench.common.statistics import ratio_spread
from bench.models.cache import cache_name

INVOCATION = [5, 6, 7]
TOKENS = 16  # decoded in each sample
# The accelerated aLoRA may take at most so many times the time of these.
TARGETS = {"PEFT LoRA": 1.0, "base": 1.6}


@dataclass(frozen=True)
class Figure:
    """The figures of one model; its fields are the columns of the csv file."""

    model: str
    layers: int
    hidden: int
    rank: int
    seconds_per_token: float
    samples: int


def build(args: argparse.Namespace) -> dict[str, Any]:
    """The four models, with the same weights."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    base = transformers.LlamaForCausalLM(config).eval()

    def adapted(tokens: list[int] | None) -> Any:
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=args.rank,
            target_modules="all-linear",
            init_lora_weights=False,
            alora_invocation_tokens=tokens,
        )
        torch.manual_seed(1)
        return get_peft_model(copy.deepcopy(base), lora).eval()

    stock = adapted(INVOCATION)
    return {
        "base": base,
        "PEFT LoRA": adapted(None),
        "PEFT aLoRA": stock,
        "alora_kernels": accelerate(copy.deepcopy(stock), strict=True),
    }


def sampler(name: str, model: Any, prompt: torch.Tensor) -> Callable[[], tuple[float, Any]]:
    """A call that decodes TOKENS tokens. It returns the seconds per token and the last logits."""
    key = cache_name(model)
    offsets = len(INVOCATION) + 2 if name == "PEFT aLoRA" else None
    with torch.no_grad():
        extra = {} if offsets is None else {"alora_offsets": [offsets]}
        prefilled = model(input_ids=prompt, use_cache=True, **extra)[key]
    tokens = torch.arange(20, 20 + TOKENS).view(TOKENS, 1, 1)

    def decode() -> tuple[float, Any]:
        cache = copy.deepcopy(prefilled)
        logits = None
        begin = time.thread_time()
        for i in range(TOKENS):
            extra = {} if offsets is None else {"alora_offsets": [offsets + i + 1]}
            logits = model(input_ids=tokens[i], **{key: cache}, **extra).logits
        return (time.thread_time() - begin) / TOKENS, logits

    return decode


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = flags.make_parser("decode", __doc__)
    add, positive = p.add_argument, flags.positive
    add("--layers", type=positive, default=32, help="of the model")
    add("--hidden", type=positive, default=64, help="size of a layer")
    add("--rank", type=positive, default=16, help="R")
    add("--seconds", type=flags.seconds, default=20.0, help="for timing, all models together")
    add("--csv", type=flags.output_file, help="write all figures to this file")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print."""
    return flags.run(parser(), arguments, _measure)


def _measure(o: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prompt = torch.randint(10, 256, (1, 24))
    prompt[0, -5:-2] = torch.tensor(INVOCATION)
    models = build(o)
    runs = {name: sampler(name, model, prompt) for name, model in models.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        logits = {name: decode()[1] for name, decode in runs.items()}  # warms up
        torch.testing.assert_close(logits["alora_kernels"], logits["PEFT aLoRA"])
        order = list(runs)
        end = time.perf_counter() + o.seconds
        while time.perf_counter() < end or len(samples["base"]) < 5:
            order.reverse()
            for name in order:
                samples[name].append(runs[name]()[0])
    console = report.make_console()
    report.print_lines(console, describe_machine(torch.device("cpu")))
    figures = [
        Figure(name, o.layers, o.hidden, o.rank, statistics.median(s), len(s))
        for name, s in samples.items()
    ]
    print_figures(console, figures, samples)
    if o.csv:
        report.write_csv(o.csv, figures)
    return 0


def print_figures(
    console: Console, figures: Sequence[Figure], samples: Mapping[str, Sequence[float]]
) -> None:
    """Print the table, then the targets and whether they are met."""
    first = figures[0]
    table = report.make_table(
        f"one token, {first.layers} layers × 7 modules, hidden {first.hidden}, rank {first.rank}, "
        "one thread, adapter_precision fp32",
        ("model", "ms per token", "quartiles", "× base", "× PEFT LoRA", "samples"),
        left=("model",),
    )
    medians = {f.model: f.seconds_per_token for f in figures}
    spreads = {}
    for name, values in samples.items():
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        table.add_row(
            name,
            f"{medians[name] * 1e3:.2f}",
            f"{low * 1e3:.2f} to {high * 1e3:.2f}",
            *(f"{medians[name] / medians[other]:.2f}" for other in ("base", "PEFT LoRA")),
            str(len(values)),
        )
        for other in {"base", "PEFT LoRA"} - {name}:
            spreads[f"{name} ÷ {other}"] = ratio_spread(values, samples[other])
    console.print(table)
    for other, most in TARGETS.items():
        ratio = medians["alora_kernels"] / medians[other]
        verdict = "within" if ratio <= most else "above"
        report.print_lines(
            console, f"alora_kernels / {other}: {ratio:.2f}, {verdict} the target of {most:.1f}"
        )
    report.warn_of_spread(console, spreads)
