"""A training step of a whole model: PEFT, the prefix without gradient, the prefix kept.

    python bench/train.py                         512+64 and 2048+64 tokens, about four minutes
    python bench/train.py --plot train.png --csv train.csv
    python bench/run.py --mode train              the same

One step is forward and backward of one batch (no optimizer). Variants take turns, so a load on the
machine meets all of them; the figure is the median. Loss and gradients are compared before anything
is timed. Peak memory is read in a process of its own for each variant: the highest resident size
during a step, less that of the process with the model loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from machine import describe_machine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from train_report import VARIANTS, Figure, print_figures, write_csv, write_plot

INVOCATION = [7, 8]
LOSS_BOUND = 1e-5  # relative, float32
GRADIENT_BOUND = 1e-3  # relative to the gradient's norm, float32


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = argparse.ArgumentParser(
        prog="bench/train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = p.add_argument
    add("--prompt", type=_lengths, help="prompt tokens, comma-separated (default: 512,2048;\n"
        "with --plot 256,512,1024,2048)")  # fmt: skip
    add("--suffix", type=int, default=64, help="tokens from the invocation on (default: 64)")
    add("--batch", type=int, default=2, help="rows (default: 2)")
    add("--rank", type=int, default=32, help="R (default: 32)")
    add("--layers", type=int, default=10, help="layers of the model (default: 10)")
    add("--rounds", type=int, default=5, help="timed steps of each variant (default: 5)")
    add("--chunk-size", type=int, default=1024, help="prefix tokens at once (default: 1024)")
    add("--threads", type=int, default=2, help="threads of torch (default: 2)")
    add("--accelerated", action="store_true", help="no_grad and cached on accelerate(model)")
    add("--no-memory", action="store_true", help="leave peak memory out")
    add("--csv", type=Path, help="write every figure here")
    add("--plot", type=Path, help="write a plot over the prompt length here (png, svg, pdf)")
    add("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit status."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.prompt is None:
        options.prompt = [256, 512, 1024, 2048] if options.plot else [512, 2048]
    if options.memory_of:
        print(json.dumps({"peak": _peak_of(options)}))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(describe_machine(torch.device("cpu")), highlight=False)
    figures = _measure(options, console)
    print_figures(figures, console)
    if options.csv:
        write_csv(options.csv, figures)
        console.print(f"csv: {options.csv}")
    if options.plot:
        write_plot(options.plot, figures, describe_machine(torch.device("cpu")))
        console.print(f"plot: {options.plot}")
    return 0


# ---------------------------------------------------------------------- what is measured


def make_model(options: argparse.Namespace) -> Any:
    """A Llama of 50 million parameters with an aLoRA on all seven projections, float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=max(options.prompt) + options.suffix,
        tie_word_embeddings=True,
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules="all-linear",
        alora_invocation_tokens=INVOCATION,
    )
    model = get_peft_model(base, adapter).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero would make every gradient of lora_A zero
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_batch(options: argparse.Namespace, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `prompt` random tokens, the invocation, and an answer with labels."""
    generator = torch.Generator().manual_seed(prompt)
    shape = (options.batch, prompt + options.suffix)
    ids = torch.randint(10, 32000, shape, generator=generator)
    ids[:, prompt : prompt + len(INVOCATION)] = torch.tensor(INVOCATION)
    labels = ids.clone()
    labels[:, : prompt + len(INVOCATION)] = -100
    return ids, torch.ones_like(ids), labels


def make_step(
    model: Any, batch: tuple[Tensor, Tensor, Tensor], variant: str, chunk_size: int
) -> Callable[[], Tensor]:
    """A forward and backward; returns the loss."""
    from alora_kernels.training import PrefixStore, prefix_forward

    ids, mask, labels = batch
    store = PrefixStore() if variant == "cached" else None

    def step() -> Tensor:
        if variant == "peft":
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        else:
            loss = prefix_forward(
                model, ids, mask, labels, variant, store=store, chunk_size=chunk_size
            ).loss
        loss.backward()
        return loss.detach()

    return step


def _measure(options: argparse.Namespace, console: Console) -> list[Figure]:
    plain = make_model(options)
    served = plain
    if options.accelerated:
        from alora_kernels.peft import accelerate

        served = make_model(options)
        accelerate(served)
    count = sum(p.numel() for n, p in plain.named_parameters() if "lora_" not in n)
    console.print(
        f"Llama from config, {count / 1e6:.1f}M parameters, float32, batch {options.batch}, rank "
        f"{options.rank} on all seven projections{', accelerated' if options.accelerated else ''}"
    )
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    total = len(options.prompt) * len(VARIANTS) * (options.rounds + (0 if options.no_memory else 1))
    figures: list[Figure] = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=total)
        for prompt in options.prompt:
            batch = make_batch(options, prompt)
            models = {v: plain if v == "peft" else served for v in VARIANTS}
            steps = {v: make_step(models[v], batch, v, options.chunk_size) for v in VARIANTS}
            progress.update(bar, description=f"{prompt}+{options.suffix}: checking")
            losses = _check(models, steps)
            wall: dict[str, list[float]] = {v: [] for v in VARIANTS}
            busy: dict[str, list[float]] = {v: [] for v in VARIANTS}
            for _ in range(options.rounds):
                for variant, step in steps.items():
                    progress.update(bar, description=f"{prompt}+{options.suffix}: {variant}")
                    models[variant].zero_grad(set_to_none=True)
                    began, used = time.perf_counter(), time.process_time()
                    step()
                    wall[variant].append(time.perf_counter() - began)
                    busy[variant].append(time.process_time() - used)
                    progress.advance(bar)
            del steps
            gc.collect()
            peaks: dict[str, float | None] = dict.fromkeys(VARIANTS)
            if not options.no_memory:
                for variant in VARIANTS:
                    progress.update(bar, description=f"{prompt}+{options.suffix}: memory {variant}")
                    peaks[variant] = _peak_in_process(options, prompt, variant)
                    progress.advance(bar)
            figures += _figures(options, prompt, wall, busy, peaks, losses)
    return figures


def _check(models: dict[str, Any], steps: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Loss and gradients of every variant equal PEFT's; a warm-up besides."""
    losses: dict[str, float] = {}
    want: dict[str, Tensor] = {}
    for variant, step in steps.items():
        model = models[variant]
        model.zero_grad(set_to_none=True)
        losses[variant] = float(step())
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if variant == "peft":
            want = got
            continue
        off = abs(losses[variant] - losses["peft"]) / losses["peft"]
        if not off <= LOSS_BOUND:
            raise SystemExit(f"{variant}: the loss is off by {off:.1e} of PEFT's; nothing is timed")
        for name, reference in want.items():
            error = float((got[name] - reference).norm() / reference.norm())
            if not error <= GRADIENT_BOUND:
                raise SystemExit(f"{variant}: the gradient of {name} is off by {error:.1e}")
    return losses


def _figures(
    options: argparse.Namespace,
    prompt: int,
    wall: dict[str, list[float]],
    busy: dict[str, list[float]],
    peaks: dict[str, float | None],
    losses: dict[str, float],
) -> list[Figure]:
    made = []
    for variant in VARIANTS:
        seconds, used = statistics.median(wall[variant]), statistics.median(busy[variant])
        peak, base = peaks[variant], peaks["peft"]
        made.append(
            Figure(
                prompt=prompt,
                suffix=options.suffix,
                batch=options.batch,
                rank=options.rank,
                variant=variant,
                accelerated=options.accelerated and variant != "peft",
                seconds=seconds,
                fastest=min(wall[variant]),
                cpu_seconds=used,
                speedup=statistics.median(wall["peft"]) / seconds,
                cpu_speedup=statistics.median(busy["peft"]) / used,
                peak_mib=peak,
                peak_ratio=peak / base if peak is not None and base else None,
                loss=losses[variant],
                rounds=options.rounds,
                threads=options.threads,
            )
        )
    return made


# ---------------------------------------------------------------------- peak memory


def _peak_in_process(options: argparse.Namespace, prompt: int, variant: str) -> float | None:
    """MiB, measured in a fresh process; None where the system does not tell."""
    command = [
        sys.executable, __file__, "--memory-of", variant, "--prompt", str(prompt),
        *("--suffix", str(options.suffix), "--batch", str(options.batch)),
        *("--rank", str(options.rank), "--layers", str(options.layers)),
        *("--threads", str(options.threads), "--chunk-size", str(options.chunk_size)),
        *(["--accelerated"] if options.accelerated and variant != "peft" else []),
    ]  # fmt: skip
    # Freed tensors go back to the system at once, so that the resident size tells what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:  # the timings are worth keeping
        print(f"peak memory of {variant} at {prompt} not measured:\n{done.stderr[-2000:]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def _peak_of(options: argparse.Namespace) -> float | None:
    """In the child: highest resident size during the second step, over the loaded model."""
    model = make_model(options)
    if options.accelerated:
        from alora_kernels.peft import accelerate

        accelerate(model)
    import alora_kernels.training  # noqa: F401, its imports are not the step's

    batch = make_batch(options, options.prompt[0])
    gc.collect()
    before = _status("VmRSS")
    step = make_step(model, batch, options.memory_of, options.chunk_size)
    step()  # fills the store, loads libraries
    model.zero_grad(set_to_none=True)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return None
    step()
    peak = _status("VmHWM")
    return None if peak is None or before is None else (peak - before) / 1024


def _status(field: str) -> int | None:
    """KiB, from the kernel's account of this process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return None


def _lengths(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers, got {text!r}")
    return values


if __name__ == "__main__":
    sys.exit(main())
