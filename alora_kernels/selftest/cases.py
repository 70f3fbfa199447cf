"""What the self-test runs: for each strategy and dtype the few problems that reach every kernel.

The sizes stand on both sides of a tile's edge; odd ones force the kernels for strided operands.
Which kernel runs depends on a GPU's number of multiprocessors: `tall` has half a tile of 128 rows
for each, which two columns of tiles make one, and rows enough for the larger blocks of `shrink`.
What the interpreter of compiled code can tell the least about comes first: `onepass` whose right
operand has N inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..contract import STRATEGIES

DTYPES = {"cuda": ("bfloat16", "float16"), "triton": ("bfloat16", "float16", "float32")}


@dataclass(frozen=True)
class Case:
    """One problem. The fields are plain values, so that a case can be sent to another process."""

    what: str  # in words, for people
    strategy: str
    dtype: str
    rows: int  # M
    depth: int  # K
    width: int  # N of each projection
    rank: int
    active: str = "half"  # none, one, some, half, all
    adapter: str = ""  # the adapter's dtype; "" is that of x
    count: int = 1  # projections
    backward: bool = True
    x_grad: bool = True  # backward takes the gradient of x, too
    dropout_p: float = 0.0
    prefix_grad: bool = True
    base_given: bool = False
    known: bool = True  # the host knows the number of active rows
    biases: bool = True
    repeated_dy: bool = False  # dy is one row for all, with stride 0

    @property
    def pair(self) -> tuple[str, str]:
        """What a verdict is about."""
        return self.strategy, self.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def adapter_dtype(self) -> torch.dtype:
        return getattr(torch, self.adapter or self.dtype)

    def __str__(self) -> str:
        sizes = f"M={self.rows} K={self.depth} N={self.width} R={self.rank}"
        return f"{self.strategy}/{self.dtype}, {self.what} ({sizes})"


def sent(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The cases as json can carry them."""
    return [dataclasses.asdict(case) for case in cases]


def received(entries: Sequence[dict[str, Any]]) -> list[Case]:
    """What `sent` has sent."""
    return [Case(**entry) for entry in entries]


def cases_of(backend: str, multiprocessors: int) -> list[Case]:
    """All cases of a backend on a GPU of that size, the riskiest first."""
    strategies = ("onepass", *(s for s in STRATEGIES if s != "onepass"))
    make = _cuda if backend == "cuda" else _triton
    return [
        case
        for dtype in DTYPES[backend]
        for strategy in strategies
        for case in make(strategy, dtype, multiprocessors)
    ]


def _cuda(strategy: str, dtype: str, multiprocessors: int) -> Iterator[Case]:
    tall = 64 * multiprocessors + 2

    def case(what: str, rows: int, depth: int, width: int, rank: int, **more: Any) -> Case:
        return Case(what, strategy, dtype, rows, depth, width, rank, **more)

    if strategy == "onepass":
        # dx reads the weight with N inside; tiles of 240, 224, 208 and 192 columns.
        for rank in (16, 32, 48, 64):
            yield case(f"right with N inside, {256 - rank} columns", tall, 520, 520, rank)
        yield case("float32 adapter, many tiles", tall, 264, 264, 24, adapter="float32")
        yield case("decode, K in slices", 9, 4104, 136, 16, backward=False, biases=False)
        yield case("decode, one row", 1, 264, 1032, 24, backward=False, active="all")
    if strategy == "tail":
        yield case("many tiles", tall, 520, 264, 16)
    yield case("many tiles, all rows active", tall, 264, 264, 32, active="all", adapter="float32")
    yield case("two tiles", 130, 264, 136, 16)
    yield case("a large rank", 130, 264, 136, 64, adapter="float32")
    yield case("few rows", 40, 72, 136, 24, active="some", adapter="float32")
    yield case("odd sizes", 130, 33, 35, 5, active="some", adapter="float32")
    yield case("odd sizes, many tiles", tall + 1, 33, 131, 5, active="all")
    yield case("only active rows of dx", 390, 264, 520, 16, prefix_grad=False)
    yield case("many tiles, only active rows of dx", tall, 264, 264, 16, prefix_grad=False)
    yield case("three layers of one x", 130, 264, 136, 24, count=3, known=False)
    yield case("dy is one row, repeated", 130, 264, 136, 16, repeated_dy=True)
    yield case("x needs no gradient", 130, 264, 1032, 16, x_grad=False)
    yield case("odd sizes, x needs no gradient", 130, 33, 35, 5, x_grad=False)
    for rank in (16, 64):  # the gradients of the adapter from one pass over dy, and from two
        yield case(
            "many rows, x needs no gradient", tall, 72, 264, rank, x_grad=False, active="all"
        )
    yield case("odd sizes, only active rows of dx", 130, 33, 35, 5, prefix_grad=False)
    yield case("no active row", 130, 72, 136, 8, active="none")
    yield case("sizes of a model", 384, 4096, 1024, 16, biases=False)
    if strategy != "onepass":
        yield case("dropout", 130, 264, 136, 24, dropout_p=0.3)
        yield case("dropout, many tiles", tall, 264, 264, 16, dropout_p=0.3, active="all")
    if strategy == "delta":
        yield case("odd sizes, many active rows of dx", tall, 33, 131, 5, prefix_grad=False)
        yield case("over a given base", 130, 72, 136, 24, base_given=True)


def _triton(strategy: str, dtype: str, multiprocessors: int) -> Iterator[Case]:
    def case(what: str, rows: int, depth: int, width: int, rank: int, **more: Any) -> Case:
        return Case(what, strategy, dtype, rows, depth, width, rank, **more)

    yield case("many rows", 512, 264, 520, 16)
    yield case("decode, K in slices", 9, 2056, 136, 16, backward=False)
    yield case("odd sizes", 130, 33, 35, 5, active="some")
    if strategy != "onepass":
        yield case("dropout", 130, 264, 136, 24, dropout_p=0.3, prefix_grad=False)
