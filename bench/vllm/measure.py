"""The requests that the vLLM benchmark sends to its engines, and the figures that come of them."""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path
from statistics import median

from bench.common.statistics import ratio_interval, ratio_spread
from bench.vllm.engine import Engine, Request, Served
from bench.vllm.models import INVOCATION_LENGTH, layers_of
from bench.vllm.report import Base, Op, Row

Times = dict[str, list[float]]  # seconds; "first a" is aLoRA's, "first p" plain LoRA's


class Bench:
    """The engines of one model folder, and the requests to them."""

    def __init__(self, o: argparse.Namespace, model: Path, scratch: Path) -> None:
        self.o, self.model, self.scratch = o, model, scratch
        self.sizes = json.loads((model / "config.json").read_text())

    def engine(self, adapters: dict[str, str], block: int, plugin: bool = True) -> Engine:
        """Start an engine with blocks of this size, with the plugin or without."""
        o = self.o
        served = Served(
            model=str(self.model),
            adapters=adapters,
            rank=o.rank,
            targets=o.targets.split(","),
            block_size=block,
            max_len=max(o.context) + 64,
            cores=o.cores or sorted(os.sched_getaffinity(0)),
            clock=o.clock,
        )
        log = self.scratch / f"engine-{block}-{plugin}.log"
        return Engine(o.engine_python, served, log, plugin)

    def _prompt(self, length: int, salt: object) -> list[int]:
        draw = random.Random(f"{self.o.seed} {length} {salt}")
        first, end = 20 + self.o.adapters, self.sizes["vocab_size"] - 1
        return [draw.randrange(first, end) for _ in range(length)]

    def _turn(self, engine: Engine, ids: list[int]) -> tuple[list[int], float]:
        """The base model's answer to `ids`, and its time.

        One more token is generated than is used: in a chat that is the end-of-turn token. The keys
        and values of a token are computed only when the token is fed to the model.
        """
        (answer,) = engine.run([Request(ids, None, self.o.tokens + 1)])
        return [*ids, *answer.ids[: self.o.tokens]], answer.total

    def _requests(self, ids: list[int], kind: str) -> list[Request]:
        """The adapters' requests; `kind` is "a" (aLoRA) or "p" (plain LoRA)."""
        return [
            Request([*ids, *[10 + i] * INVOCATION_LENGTH], f"{kind}{i}", self.o.tokens)
            for i in range(self.o.adapters)
        ]

    def check(self, engine: Engine) -> str | None:
        """What is wrong with the answers, or None. It warms the engine up, too."""
        block = engine.started["block_size"]
        engine.reset()
        ids, _ = self._turn(engine, self._prompt(2 * block, "check"))
        requests = self._requests(ids, "a")
        warm = engine.run(requests)
        plain = engine.run(self._requests(ids, "p"))
        for request, answer, other in zip(requests, warm, plain):
            engine.reset()
            (cold,) = engine.run([request])
            if answer.cached != len(ids) // block * block or cold.cached or other.cached:
                return (
                    f"{request.adapter}: {answer.cached} tokens from the cache after a base turn "
                    f"of {len(ids)} in blocks of {block}, {cold.cached} from an empty cache, and "
                    f"{other.cached} for the plain LoRA"
                )
            if answer.ids[0] != cold.ids[0]:
                return f"{request.adapter}: {answer.ids} on the cache, {cold.ids} from scratch"
        return None

    def measure(
        self, engine: Engine, context: int, start: str, together: bool
    ) -> tuple[Row, Times]:
        """One row of medians over interleaved rounds, and the seconds of all rounds."""
        times: Times = {}
        cached: list[int] = []
        asked = 0

        def note(what: str, *seconds: float) -> None:
            times.setdefault(what, []).extend(seconds)

        length = context - (start == "worst")
        for number in range(self.o.rounds):
            ids = self._prompt(length - self.o.tokens, number)
            engine.reset()
            ids, seconds = self._turn(engine, ids)
            note("base", seconds)
            for request in self._requests(ids, "a"):
                (answer,) = engine.run([request])
                note("first a", answer.first)
                note("total a", answer.total)
                cached.append(answer.cached)
                asked += len(request.ids)
            (answer,) = engine.run(self._requests(ids, "p")[:1])
            note("first p", answer.first)
            note("total p", answer.total)
            if together:
                engine.reset()
                again, seconds = self._turn(engine, ids[: length - self.o.tokens])
                note("base", seconds)
                note("all a", max(a.total for a in engine.run(self._requests(again, "a"))))
                engine.reset()
                note("all p", max(a.total for a in engine.run(self._requests(again, "p"))))
        of = {what: median(samples) for what, samples in times.items()}
        row = Row(
            block_size=engine.started["block_size"],
            start=start,
            context=context,
            rounds=self.o.rounds,
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

    def measure_ops(self, engine: Engine) -> list[Op]:
        """Time vLLM's CPU op and ours for each layer, on a prefill of one adapter."""
        layers = layers_of(self.sizes)
        found = engine.ask(
            do="ops",
            rows=self.o.op_rows,
            shapes=list(layers.values()),
            rank=self.o.rank,
            repeats=5,
            threads=engine.started["threads"][0]["threads"],
        )
        for layer, figures in zip(layers, found):
            if figures["difference"] > 1e-5:
                raise RuntimeError(f"{layer}: the two ops differ by {figures['difference']:.1e}")
        return [Op(n, self.o.op_rows, f["ours"], f["stock"]) for n, f in zip(layers, found)]

    def measure_base(self) -> tuple[Base, float]:
        """Send base requests to two running engines in turn. One is idle while the other works.

        Returns the medians, and the spread of their ratio.
        """
        block = self.o.block_size[0]
        pairs: list[tuple[float, float]] = []
        with (
            self.engine({}, block) as ours,
            self.engine({}, block, plugin=False) as stock,
        ):
            for number in range(-2, self.o.requests):
                ids = self._prompt(2 * block, f"base {number}")
                order = (ours, stock) if number % 2 else (stock, ours)
                seconds = {e is ours: e.run([Request(ids, None, self.o.tokens)])[0] for e in order}
                if seconds[True].ids != seconds[False].ids:
                    raise RuntimeError(f"base request {number}: other tokens with the plugin")
                if number >= 0:  # the first two only warm up
                    pairs.append((seconds[True].total, seconds[False].total))
        low, high = ratio_interval(pairs, self.o.seed)
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


def spreads_of(times: Times, where: str) -> dict[str, float]:
    """The spread of each ratio of plain LoRA to aLoRA."""
    names = {"first": "first token", "total": "one request", "all": "all adapters"}
    return {
        f"{name}, plain ÷ aLoRA, {where}": ratio_spread(times[f"{key} p"], times[f"{key} a"])
        for key, name in names.items()
        if f"{key} p" in times
    }
