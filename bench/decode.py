"""Decode overhead on the CPU: one token through many small layers, all seven modules adapted.

    python bench/decode.py [--seconds 20] [--csv decode.csv]

The layers are so small that the host's work per layer is what is measured. Four models with the
same weights run in turn: the base, PEFT's plain LoRA, PEFT's aLoRA (given its offsets in every
step, without which it is off), and the aLoRA accelerated by this package. Each sample decodes some
tokens on a copy of one prefilled cache. The clock is the thread's own processor time, which
equals wall-clock time on a machine that does nothing else, and stays comparable on one that does.
"""

from __future__ import annotations

import argparse
import copy
import csv
import inspect
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe_machine
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from alora_kernels import accelerate

INVOCATION = [5, 6, 7]
TOKENS = 16  # decoded in each sample
TARGETS = {"PEFT LoRA": 1.0, "base": 1.6}  # at most so many times as slow


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


def cache_name(model: Any) -> str:
    """What this version of transformers calls the cache of a forward."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(inner.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def sampler(name: str, model: Any, prompt: torch.Tensor) -> Callable[[], tuple[float, Any]]:
    """A call that decodes TOKENS tokens and returns seconds per token and the last logits."""
    key = cache_name(model)
    offsets = len(INVOCATION) + 2 if name == "PEFT aLoRA" else None
    with torch.no_grad():
        extra = {} if offsets is None else {"alora_offsets": [offsets]}
        prefilled = model(input_ids=prompt, use_cache=True, **extra)[key]
    tokens = torch.arange(20, 20 + TOKENS).view(TOKENS, 1, 1)

    def run() -> tuple[float, Any]:
        cache = copy.deepcopy(prefilled)
        logits = None
        begin = time.thread_time()
        for i in range(TOKENS):
            extra = {} if offsets is None else {"alora_offsets": [offsets + i + 1]}
            logits = model(input_ids=tokens[i], **{key: cache}, **extra).logits
        return (time.thread_time() - begin) / TOKENS, logits

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="for all models together")
    parser.add_argument("--csv", type=Path, help="write the figures there")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prompt = torch.randint(10, 256, (1, 24))
    prompt[0, -5:-2] = torch.tensor(INVOCATION)
    models = build(args)
    runs = {name: sampler(name, model, prompt) for name, model in models.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        logits = {name: run()[1] for name, run in runs.items()}  # warms up
        torch.testing.assert_close(logits["alora_kernels"], logits["PEFT aLoRA"])
        order = list(runs)
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end or len(samples["base"]) < 5:
            order.reverse()
            for name in order:
                samples[name].append(runs[name]()[0])
    report(args, samples)


def report(args: argparse.Namespace, samples: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(s) for name, s in samples.items()}
    console = Console()
    console.print(describe_machine(torch.device("cpu")))
    table = Table(
        title=f"one token, {args.layers} layers × 7 modules, hidden {args.hidden}, "
        f"rank {args.rank}, one thread, adapter_precision fp32"
    )
    for heading in ("", "ms per token", "quartiles", "× base", "× PEFT LoRA", "samples"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in samples.items():
        low, _, high = statistics.quantiles(values, n=4)
        table.add_row(
            name,
            f"{medians[name] * 1e3:.2f}",
            f"{low * 1e3:.2f} to {high * 1e3:.2f}",
            *(f"{medians[name] / medians[other]:.2f}" for other in ("base", "PEFT LoRA")),
            str(len(values)),
        )
    console.print(table)
    for other, most in TARGETS.items():
        ratio = medians["alora_kernels"] / medians[other]
        verdict = "within" if ratio <= most else "above"
        console.print(f"alora_kernels / {other}: {ratio:.2f}, {verdict} the target of {most:.1f}")
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "layers", "hidden", "rank", "seconds_per_token", "samples"])
            for name, values in samples.items():
                size = (args.layers, args.hidden, args.rank)
                writer.writerow([name, *size, f"{medians[name]:.6g}", len(values)])


if __name__ == "__main__":
    main()
