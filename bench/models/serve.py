"""Many adapters over one context: this package's Session against plain LoRA.

    python bench/run.py --mode serve                 Gemma 3 270M, five adapters, minutes
    python bench/run.py --mode serve --context 2000 --rounds 5 --csv serve.csv --plot serve.png
    python bench/run.py --mode serve --small         a tiny model, seconds: shows that it runs

The base model has read the context and answered a turn. Two things are timed from there:
    first token   one adapter's first token. An aLoRA runs its invocation on the base cache. A plain
                  LoRA with the same tensors has other keys, so it reads the whole context again
    all answers   every adapter's answer: in one batch over one copy of the cache, one by one on
                  it, and the plain LoRAs one by one and batched by PEFT's adapter_names

Rounds are interleaved. All answers one by one, and all answers of the plain LoRAs, take longest.
They also vary least, since each consists of many long forwards: so they get fewer rounds
(--long-rounds). The first token is measured in many pairs with the base model's forward of the same
tokens on the same cache (--pairs). Before the timing, answers are compared with one forward from
scratch: some adapters' at each context length, and every adapter's at one of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

import alora_kernels
from alora_kernels.inference import Session, view_of
from bench.common import flags, report
from bench.common.clocks import READERS
from bench.common.machine import describe_machine
from bench.common.statistics import ratio_interval, ratio_spread
from bench.models.cache import cache_name
from bench.models.serve_models import load_models
from bench.models.serve_report import (
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
    write_plot,
)

OWN = {FIRST: (FIRST, OURS), ALL: (ALL, BATCH)}  # the ways whose times all others are divided by
Times = dict[tuple[str, str], list[float]]  # seconds of each round, by what was measured and how


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = flags.make_parser("serve", __doc__)
    add, positive = p.add_argument, flags.positive
    add("--model", help="a local folder (default: Gemma 3 270M of the extra [model])")
    add("--small", action="store_true", help="a tiny Gemma 3 from config and short contexts")
    about = "tokens, comma-separated (default: 500,1000,2000)"
    add("--context", type=flags.numbers_above(1), help=about)
    add("--adapters", type=positive, default=5, help="how many")
    add("--tokens", type=positive, default=16, help="of each answer")
    add("--rank", type=positive, default=32, help="R")
    add("--targets", default="all-linear", help="adapted layers")
    add("--rounds", type=positive, default=3, help="of each variant")
    add("--long-rounds", type=positive, default=1, help="of the long variants")
    add("--pairs", type=positive, default=24, help="of first token and base forward")
    add("--seed", type=int, default=0, help="of the prompts and adapters")
    flags.add_device(p)
    flags.add_threads(p)
    flags.add_clock(p, condition="--threads 1")
    flags.add_files(p, plot="the times over the context length")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print. Returns 1 if an answer on the cache differs from one from scratch."""
    return flags.run(parser(), arguments, _run)


def _run(o: argparse.Namespace) -> int:
    if o.clock == "cpu" and (o.threads > 1 or o.device.type != "cpu"):
        raise flags.UsageError(
            "--clock cpu adds up the threads of a CPU: it needs --threads 1 and --device cpu"
        )
    torch.set_num_threads(o.threads)
    contexts = o.context or ([64, 128] if o.small else [500, 1000, 2000])
    console = report.make_console()
    activated, plain, tokenizer = load_models(o)
    machine = describe_machine(o.device)
    name = o.model or ("tiny" if o.small else "Gemma 3 270M")
    dtype = str(activated.get_base_model().dtype).removeprefix("torch.")
    served = (
        f"{name}, {dtype}, {o.adapters} adapters of rank {o.rank} on {o.targets}, answers of "
        f"{o.tokens} tokens"
    )
    report.print_lines(console, machine, f"{served}, {o.clock} time")
    rows: list[Row] = []
    spreads: dict[str, float] = {}
    with report.make_progress() as progress:
        task = progress.add_task("checking", total=len(contexts) * (o.rounds + 1))
        for number, context in enumerate(contexts):
            progress.update(task, description=f"checking, {context} tokens")
            bench = Bench(o, activated, plain, tokenizer, context)
            wrong = bench.check(share(bench.names, number, len(contexts)))
            if wrong:
                console.print(f"[red]{wrong}[/]", highlight=False)
                return 1
            progress.update(task, advance=1, description=f"{context} tokens")
            times = bench.measure(lambda: progress.advance(task))
            rows += rows_of(times, context, o.seed)
            spreads.update(spreads_of(times, context))
    print_rows(console, rows)
    report.warn_of_spread(console, spreads)
    if o.csv:
        report.write_csv(o.csv, rows)
    if o.plot:
        write_plot(o.plot, rows, served, machine)
    return 0


class Bench:
    """The models and calls of one context length."""

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
        self.device, self.cache_name = activated.device, cache_name(activated)
        self.options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
        self.clock: Callable[[Callable[[], Any]], float] | None = None  # in place of --clock's
        # By how much of the largest logit another token may be better: rounding in 16 bits.
        dtype = activated.get_base_model().dtype
        self.tolerance = 1e-3 if dtype == torch.float32 else 3e-2

    def suffix(self, name: str) -> list[int]:
        return [self.ids[-1], *self.activated.peft_config[name].alora_invocation_tokens]

    def check(self, names: Sequence[str]) -> str | None:
        """Compare the batch's answers with one forward from scratch. Returns what is wrong."""
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
                if gap > self.tolerance * float(logits[i].abs().max()):
                    return (
                        f"context {self.context}, adapter {name}: token {i} is {token}, but from "
                        f"scratch another is better by {gap:.2e}; nothing was timed"
                    )
        return None

    def measure(self, tick: Callable[[], None]) -> Times:
        """The seconds of all rounds."""
        o = self.o
        times: Times = {(FIRST, OURS): [], (FIRST, BASE): []}
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
        return times

    def _pairs(self, count: int, ours: list[float], base: list[float]) -> None:
        """Time the two short calls in turn, in alternating order, so that noise affects both alike.

        The first pair is not counted: a long call has just filled the processor's caches.
        """
        for turn in range(count + 1):
            order = [(self.first_alora, ours), (self.first_base, base)]
            for call, samples in order if turn % 2 else reversed(order):
                seconds = self._time(call)
                if turn:
                    samples.append(seconds)

    def _time(self, call: Callable[[], Any]) -> float:
        if self.clock is not None:
            return self.clock(call)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        clock = READERS[self.o.clock]
        began = clock()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock() - began

    def _length(self) -> dict[str, Any]:
        return {"max_new_tokens": self.o.tokens, "min_new_tokens": self.o.tokens}

    def first_alora(self) -> Any:
        return self.session.generate(self.names[0], max_new_tokens=1, **self.options)

    def first_base(self) -> Any:
        ids = torch.tensor([self.suffix(self.names[0])], device=self.device)
        with torch.no_grad(), self.session.adapters.scope(None, [None]):
            view = view_of(self.session.cache)
            return self.session.base(ids, logits_to_keep=1, **{self.cache_name: view})

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

    def _plain(self, names: list[str], length: dict[str, Any], **extra: Any) -> Any:
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


def rows_of(times: Times, context: int, seed: int) -> Iterator[Row]:
    """The medians of one context length, and their ratios to this package's own way."""
    middle = {key: statistics.median(samples) for key, samples in times.items()}
    ours, base = (FIRST, OURS), (FIRST, BASE)
    low, high = ratio_interval(list(zip(times[ours], times[base])), seed)
    for key, samples in times.items():
        what, variant = key
        row = Row(
            context=context,
            what=what,
            variant=variant,
            rounds=len(samples),
            median_s=middle[key],
            min_s=min(samples),
            ratio=middle[key] / middle[OWN[what]],
        )
        if key == ours:
            over = middle[ours] / middle[base]
            row = replace(row, over_base=over, over_base_low=low, over_base_high=high)
        yield row


def spreads_of(times: Times, context: int) -> dict[str, float]:
    """The spread of each ratio of one context length."""
    return {
        f"{what} of {variant} ÷ {OWN[what][1]}, {context} tokens": ratio_spread(
            samples, times[OWN[what]]
        )
        for (what, variant), samples in times.items()
        if (what, variant) != OWN[what]
    }


def share(names: list[str], number: int, count: int) -> list[str]:
    """The adapters to check at context `number` of `count`: an equal share, at least one."""
    return names[number::count] or [names[number % len(names)]]


def spread(count: int, rounds: int) -> set[int]:
    """The rounds in which a variant with only `count` rounds is measured, evenly spread."""
    return {int((i + 0.5) * rounds / min(count, rounds)) for i in range(min(count, rounds))}
