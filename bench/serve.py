"""Many adapters over one context: this package's Session against plain LoRA.

    python bench/run.py --mode serve                 Gemma 3 270M, five adapters, minutes
    python bench/run.py --mode serve --context 2000 --rounds 5 --csv serve.csv --plot serve.png
    python bench/serve.py --small                    a tiny model, seconds: shows that it runs

The base model has read the context (a turn that it has just answered). Timed from there:
    first token   one adapter's first token: its invocation on the base cache (aLoRA), or the whole
                  context again (a plain LoRA with the same tensors, whose keys are its own)
    all answers   every adapter's answer: in one batch over one copy of the cache, one by one on
                  it, and the plain LoRAs one by one and batched by PEFT's adapter_names

Rounds are interleaved. Answers one by one, and all of the plain LoRAs' answers, take longest and
vary least, for each is made of many long forwards: they get fewer rounds (--long-rounds). The first
token is measured in many pairs with the base model's forward of the same tokens on that cache
(--pairs). Before the timing some of the adapters' answers are checked at each context length, and
every adapter's at one of them, against one forward from scratch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from intervals import ratio_interval
from machine import describe_machine
from rich.console import Console
from rich.progress import Progress
from serve_models import load_models
from serve_report import (
    ALL,
    ALONE,
    BASE,
    BATCH,
    FIRST,
    OURS,
    PLAIN,
    PLAIN_ALONE,
    PLAIN_BATCH,
    Row,
    print_rows,
    write_csv,
    write_plot,
)

import alora_kernels
from alora_kernels.inference import Session, view_of


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
    add("--long-rounds", type=int, default=1, help="of the long variants (default: 1)")
    add("--pairs", type=int, default=24, help="of first token and base forward (default: 24)")
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
    counts = ("adapters", "tokens", "rank", "rounds", "long_rounds", "pairs", "threads")
    if min(getattr(o, name) for name in counts) < 1:
        p.error(", ".join(f"--{name.replace('_', '-')}" for name in counts) + ": at least 1 each")
    if o.clock == "cpu" and (o.threads > 1 or o.device != "cpu"):
        p.error("--clock cpu adds up the threads of a CPU: it needs --threads 1 and --device cpu")
    torch.set_num_threads(o.threads)
    contexts = o.context or ([64, 128] if o.small else [500, 1000, 2000])
    # A file or a pipe has no width: give it one that holds the tables.
    console = Console(width=None if sys.stdout.isatty() else 120)
    activated, plain, tokenizer = load_models(o)
    machine = describe_machine(torch.device(o.device))
    console.print(machine, highlight=False, soft_wrap=True)
    name = o.model or ("tiny" if o.small else "Gemma 3 270M")
    dtype = str(activated.get_base_model().dtype).removeprefix("torch.")
    served = (
        f"{name}, {dtype}, {o.adapters} adapters of rank {o.rank} on {o.targets}, answers of "
        f"{o.tokens} tokens"
    )
    console.print(f"{served}, {o.clock} time", highlight=False, soft_wrap=True)
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking", total=len(contexts) * (o.rounds + 1))
        for number, context in enumerate(contexts):
            progress.update(task, description=f"checking, {context} tokens")
            bench = Bench(o, activated, plain, tokenizer, context)
            wrong = bench.check(share(bench.names, number, len(contexts)))
            if wrong:
                console.print(f"[red]{wrong}[/]", highlight=False)
                return 1
            progress.update(task, advance=1, description=f"{context} tokens")
            rows += bench.measure(lambda: progress.advance(task))
    print_rows(console, rows)
    if o.csv:
        write_csv(o.csv, rows)
    if o.plot:
        write_plot(o.plot, rows, served, machine)
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

    def check(self, names: Sequence[str]) -> str | None:
        """These answers of the batch against one forward from scratch, or what is wrong."""
        answers = dict(zip(self.names, self.all_batch()))
        for name in names:
            answer = answers[name]
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
        o = self.o
        times: dict[tuple[str, str], list[float]] = {(FIRST, OURS): [], (FIRST, BASE): []}
        calls = {
            (FIRST, PLAIN): (self.first_plain, o.rounds),
            (ALL, BATCH): (self.all_batch, o.rounds),
            (ALL, ALONE): (self.all_alone, o.long_rounds),
            (ALL, PLAIN_ALONE): (self.all_plain, o.long_rounds),
            (ALL, PLAIN_BATCH): (self.all_plain_batch, o.long_rounds),
        }
        for number in range(o.rounds):
            self._pairs(-(-o.pairs // o.rounds), times[FIRST, OURS], times[FIRST, BASE])
            for key, (call, rounds) in calls.items():
                if number in spread(rounds, o.rounds):
                    times.setdefault(key, []).append(self._time(call))
            tick()
        pairs = list(zip(times[FIRST, OURS], times[FIRST, BASE]))
        middle = {key: statistics.median(samples) for key, samples in times.items()}
        over_base = {
            (FIRST, OURS): (
                middle[FIRST, OURS] / middle[FIRST, BASE],
                *ratio_interval(pairs, o.seed),
            )
        }
        rows = []
        for (what, variant), samples in times.items():
            key = what, variant
            own = middle[what, OURS if what == FIRST else BATCH]
            rows.append(
                Row(
                    self.context,
                    what,
                    variant,
                    len(samples),
                    middle[key],
                    min(samples),
                    middle[key] / own,
                    *over_base.get(key, ()),
                )
            )
        return rows

    def _pairs(self, count: int, ours: list[float], base: list[float]) -> None:
        """The two short calls in turn, the order changing, so that noise weighs on both alike.

        The first pair does not count: it finds the processor's caches as a long call has left them.
        """
        for turn in range(count + 1):
            order = [(self.first_alora, ours), (self.first_base, base)]
            for call, samples in order if turn % 2 else reversed(order):
                seconds = self._time(call)
                if turn:
                    samples.append(seconds)

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


def share(names: list[str], number: int, count: int) -> list[str]:
    """The part of `names`, one at least, that the context `number` of `count` checks."""
    return names[number::count] or [names[number % len(names)]]


def spread(count: int, rounds: int) -> set[int]:
    """Which of `rounds` rounds measure what is measured `count` times: the middle one, ..."""
    return {int((i + 0.5) * rounds / min(count, rounds)) for i in range(min(count, rounds))}


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 2:
        raise argparse.ArgumentTypeError("a context has at least 2 tokens")
    return values


if __name__ == "__main__":
    sys.exit(main())
