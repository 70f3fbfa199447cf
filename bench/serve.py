"""Many adapters over one context: this package's Session against plain LoRA.

    python bench/run.py --mode serve                 Gemma 3 270M, five adapters, ten minutes
    python bench/run.py --mode serve --context 2000 --rounds 5 --csv serve.csv --plot serve.png
    python bench/serve.py --small                    a tiny model, seconds: shows that it runs

The base model has read the context (a turn that it has just answered). Timed from there:
    first token   one adapter's first token: its invocation on the base cache (aLoRA), or the whole
                  context again (a plain LoRA with the same tensors, whose keys are its own)
    all answers   every adapter's answer: in one batch over one copy of the cache, one by one on
                  it, and the plain LoRAs one by one and batched by PEFT's adapter_names
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import alora_kernels
from alora_kernels.inference import Session, view_of

INVOCATION_LENGTH = 5
FIRST, ALL = "first token", "all answers"
SHORT = ("aLoRA on the base cache", "base forward of its tokens")


@dataclass(frozen=True)
class Row:
    """One variant at one context length; the columns of the csv file."""

    context: int
    what: str
    variant: str
    rounds: int
    median_s: float
    min_s: float
    ratio: float | None = None  # time over that of the first variant of the group


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = argparse.ArgumentParser(
        prog="bench/serve.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = p.add_argument
    add("--model", help="a local folder (default: Gemma 3 270M of the extra [model])")
    add("--small", action="store_true", help="a tiny Gemma 3 from config and short contexts")
    add("--context", type=_numbers, help="tokens, comma-separated (default: 500,1000,2000)")
    add("--adapters", type=int, default=5)
    add("--tokens", type=int, default=16, help="of each answer (default: 16)")
    add("--rank", type=int, default=32)
    add("--targets", default="all-linear", help="adapted layers (default: all-linear)")
    add("--rounds", type=int, default=3)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the process's CPU time, for a machine that others use too; with --threads 1",
    )
    add("--seed", type=int, default=0)
    add("--csv", type=Path)
    add("--plot", type=Path)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print. Returns 1 when an answer on the cache is not that from scratch."""
    p = parser()
    o = p.parse_args(arguments)
    if min(o.adapters, o.tokens, o.rank, o.rounds, o.threads) < 1:
        p.error("--adapters, --tokens, --rank, --rounds and --threads must be at least 1")
    if o.clock == "cpu" and (o.threads > 1 or o.device != "cpu"):
        p.error("--clock cpu adds up the threads of a CPU: it needs --threads 1 and --device cpu")
    torch.set_num_threads(o.threads)
    contexts = o.context or ([64, 128] if o.small else [500, 1000, 2000])
    console = Console()
    activated, plain, tokenizer = _models(o)
    device = torch.device(o.device)
    console.print(describe_machine(device), highlight=False, soft_wrap=True)
    name = o.model or ("tiny" if o.small else "Gemma 3 270M")
    console.print(
        f"{name}, {activated.get_base_model().dtype}, {o.adapters} adapters of rank {o.rank} on "
        f"{o.targets}, answers of {o.tokens} tokens, {o.clock} time",
        highlight=False,
    )
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("checking", total=len(contexts) * (o.rounds + 1))
        for context in contexts:
            bench = Bench(o, activated, plain, tokenizer, context)
            wrong = bench.check()
            if wrong:
                console.print(f"[red]{wrong}[/]", highlight=False)
                return 1
            progress.update(task, advance=1, description=f"{context} tokens")
            rows += bench.measure(lambda: progress.advance(task))
    _print(console, rows)
    if o.csv:
        with o.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)
    if o.plot:
        _plot(o.plot, rows, describe_machine(device))
    return 0


class Bench:
    """The variants at one context length."""

    def __init__(
        self, o: argparse.Namespace, activated: Any, plain: Any, tokenizer: Any, context: int
    ) -> None:
        self.o, self.activated, self.plain, self.context = o, activated, plain, context
        generator = torch.Generator().manual_seed(o.seed)
        size = activated.get_base_model().config.vocab_size
        self.ids = torch.randint(
            20 + o.adapters, size - 1, (context,), generator=generator
        ).tolist()
        self.names = [f"a{i}" for i in range(o.adapters)]
        self.session = Session(activated, tokenizer).extend(self.ids)
        self.device = activated.device
        self.options = {"do_sample": False, "pad_token_id": 0}

    def suffix(self, name: str) -> list[int]:
        return [self.ids[-1], *self.activated.peft_config[name].alora_invocation_tokens]

    def check(self) -> str | None:
        """Every answer of the batch against one forward from scratch, or what is wrong."""
        answers = self.session.ask(self.names, **self._length(), **self.options)
        for name, answer in zip(self.names, answers):
            before = [*self.ids, *answer.invocation]
            ids = torch.tensor([[*before, *answer.token_ids]], device=self.device)
            with (
                torch.no_grad(),
                alora_kernels.peft.adapter_scope(self.activated, name, starts=[self.context]),
            ):
                count = len(answer.token_ids) + 1
                logits = self.activated.get_base_model()(ids, logits_to_keep=count).logits[0]
            for i, token in enumerate(answer.token_ids):
                gap = float(logits[i].max() - logits[i, token])
                if gap > 1e-3 * float(logits[i].abs().max()):
                    return (
                        f"context {self.context}, adapter {name}: token {i} is {token}, but from "
                        f"scratch another is better by {gap:.2e}; nothing was timed"
                    )
        return None

    def measure(self, tick: Callable[[], None]) -> list[Row]:
        """Interleaved rounds; medians."""
        groups = {
            FIRST: {
                SHORT[0]: self.first_alora,
                SHORT[1]: self.first_base,
                "plain LoRA": self.first_plain,
            },
            ALL: {
                "aLoRA, one batch": self.all_batch,
                "aLoRA, one by one": self.all_alone,
                "plain LoRA, one by one": self.all_plain,
                "plain LoRA, batched": self.all_plain_batch,
            },
        }
        times: dict[tuple[str, str], list[float]] = {}
        for calls in groups.values():
            calls[next(iter(calls))]()  # warm
        for _ in range(self.o.rounds):
            for what, calls in groups.items():
                order = list(calls)
                if what == FIRST:
                    # The short ones in turns, so that noise weighs on both alike. The first turn
                    # does not count: it finds the caches as a long one has left them.
                    order = [*SHORT * 5, *(v for v in calls if v not in SHORT)]
                for turn, variant in enumerate(order):
                    spent = self._time(calls[variant])
                    if what != FIRST or turn >= len(SHORT):
                        times.setdefault((what, variant), []).append(spent)
            tick()
        rows = []
        for (what, variant), samples in times.items():
            own = statistics.median(times[what, next(iter(groups[what]))])
            middle = statistics.median(samples)
            rows.append(
                Row(self.context, what, variant, len(samples), middle, min(samples), middle / own)
            )
        return rows

    def _time(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        clock = time.process_time if self.o.clock == "cpu" else time.perf_counter
        began = clock()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock() - began

    def _length(self) -> dict[str, int]:
        return {"max_new_tokens": self.o.tokens, "min_new_tokens": self.o.tokens}

    def first_alora(self) -> Any:
        return self.session.generate(self.names[0], max_new_tokens=1, **self.options)

    def first_base(self) -> Any:
        ids = torch.tensor([self.suffix(self.names[0])], device=self.device)
        table = self.session.adapters
        with torch.no_grad(), table.scope(None, [None]):
            view = view_of(self.session._cache)
            return table.base(ids, logits_to_keep=1, **{table.cache_argument: view})

    def first_plain(self) -> Any:
        return self._plain(self.names[:1], {"max_new_tokens": 1})

    def all_batch(self) -> Any:
        return self.session.ask(self.names, **self._length(), **self.options)

    def all_alone(self) -> Any:
        return [self.session.generate(n, **self._length(), **self.options) for n in self.names]

    def all_plain(self) -> Any:
        return [self._plain([name], self._length()) for name in self.names]

    def all_plain_batch(self) -> Any:
        return self._plain(self.names, self._length(), adapter_names=list(self.names))

    def _plain(self, names: list[str], length: dict[str, int], **extra: Any) -> Any:
        ids = torch.tensor(
            [[*self.ids, *self.suffix(name)[1:]] for name in names], device=self.device
        )
        if not extra:
            self.plain.set_adapter(names[0])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            return self.plain.generate(
                input_ids=ids, attention_mask=mask, **length, **self.options, **extra
            )


def _models(o: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The same tensors twice: as activated adapters (accelerated), and as plain ones (PEFT)."""
    if o.small:
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        torch.manual_seed(o.seed)
        config = Gemma3TextConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=32,
            max_position_embeddings=1024,
        )
        bases = [Gemma3ForCausalLM(config) for _ in range(2)]
        bases[1].load_state_dict(bases[0].state_dict())
        tokenizer: Any = _NoText(config.vocab_size)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from alora_kernels.gguf import gemma_270m

        folder = o.model or gemma_270m()
        bases = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
        tokenizer = AutoTokenizer.from_pretrained(folder)
    models = []
    for base, activated in zip(bases, (True, False)):
        model: Any = None
        for i in range(o.adapters):
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=o.rank,
                lora_alpha=o.rank,
                target_modules=o.targets if o.targets == "all-linear" else o.targets.split(","),
                alora_invocation_tokens=[10 + i] * INVOCATION_LENGTH if activated else None,
            )
            if model is None:
                model = get_peft_model(base, config, adapter_name=f"a{i}")
            else:
                model.add_adapter(f"a{i}", config)
        torch.manual_seed(o.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.02)
        models.append(model.to(o.device).eval())
    return alora_kernels.accelerate(models[0]), models[1], tokenizer


class _NoText:
    """Token ids only: the tiny model has no tokenizer."""

    eos_token_id, pad_token_id, chat_template = 1, 0, None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
        return " ".join(map(str, ids))


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 2:
        raise argparse.ArgumentTypeError("a context has at least 2 tokens")
    return values


def _print(console: Console, rows: Sequence[Row]) -> None:
    for what in (FIRST, ALL):
        table = Table(title=what)
        table.add_column("context", justify="right")
        table.add_column("variant")
        for column in ("median", "min", "× the first"):
            table.add_column(column, justify="right")
        for row in (r for r in rows if r.what == what):
            table.add_row(
                str(row.context),
                row.variant,
                f"{1e3 * row.median_s:.1f} ms",
                f"{1e3 * row.min_s:.1f} ms",
                f"{row.ratio:.2f}",
            )
        console.print(table)


def _plot(path: Path, rows: Sequence[Row], subtitle: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, what in zip(axes, (FIRST, ALL)):
        for variant in dict.fromkeys(r.variant for r in rows if r.what == what):
            points = [
                (r.context, r.median_s) for r in rows if (r.what, r.variant) == (what, variant)
            ]
            axis.plot(*zip(*sorted(points)), "o-", label=variant)
        axis.set(title=what, xlabel="context, tokens", ylabel="seconds", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.suptitle(subtitle, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
