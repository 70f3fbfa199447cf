"""What one call costs on the host, in Python and autograd. Kernels are not launched.

    python bench/run.py --mode host [--backend cuda,cpu] [--rounds 200] [--calls 20]

On the cuda path the extension is replaced by one whose programs return at once. So the tensors can
lie on the CPU, and no GPU is needed. A GPU with short kernels would wait for what is left:
checking, choosing, finding the program, autograd. Allocating the outputs is timed separately and
subtracted; nothing else is. The work of C++ in a call is left out: a quarter of a microsecond, what
the driver takes to encode each tensor map, and the launches.

Times are processor time of the one running thread, so other work on the machine adds little.
"forward with grad" is one call that autograd records. "forward + backward" adds PyTorch's engine
and the second call, which the engine makes.
The cpu backend and the vendor's GEMM in `delta` do compute. Their layers are small, and their times
are upper bounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import alora_kernels
from alora_kernels import Activation, AloraLinear, alora_linear, dispatch
from alora_kernels.backends.cuda import CudaBackend
from alora_kernels.backends.cuda.params import exported
from alora_kernels.contract import Problem
from alora_kernels.run import forget
from bench.common import flags, report
from bench.common.machine import describe_machine
from bench.common.statistics import Timing

MACHINE = (132, 90)  # the multiprocessors and arch of an H100, for which the cuda backend plans
BACKENDS = ("cuda", "cpu")


class Stub(SimpleNamespace):
    """Takes the place of alora_kernels._cuda, and counts launches."""

    def __init__(self) -> None:
        super().__init__(launches=0, **exported())

    def Program(self, launches: Sequence[Any], residues: Sequence[int]) -> Callable[..., bool]:
        """Several launches in a row. A call of the program takes addresses and a stream."""

        def call(addresses: list[int], device: int, stream: int) -> bool:
            self.launches += len(launches)
            return True

        return call


class StubbedCuda(CudaBackend):
    """The cuda backend, made to believe that it runs on an H100."""

    def __init__(self) -> None:
        super().__init__(machine=MACHINE)

    def why_not_here(self) -> str | None:
        return None

    def why_not(self, problem: Problem, strategy: str) -> str | None:
        return super().why_not(problem._replace(device="cuda"), strategy)


@contextmanager
def stubbed() -> Iterator[Stub]:
    """Let the cuda backend plan for an H100 with CPU tensors, and launch nothing."""
    stub = Stub()
    missing = object()
    places: list[tuple[Any, str, Any]] = [
        (alora_kernels, "_cuda", stub),
        (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
    ]
    before = [getattr(owner, name, missing) for owner, name, _ in places]
    module, backend = sys.modules.get("alora_kernels._cuda"), dispatch.BACKENDS["cuda"]
    for owner, name, value in places:
        setattr(owner, name, value)
    sys.modules["alora_kernels._cuda"] = stub  # type: ignore[assignment]
    dispatch.BACKENDS["cuda"] = StubbedCuda()
    forget()
    try:
        yield stub
    finally:
        for (owner, name, _), value in zip(places, before):
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        sys.modules.pop("alora_kernels._cuda")
        if module is not None:
            sys.modules["alora_kernels._cuda"] = module
        dispatch.BACKENDS["cuda"] = backend
        forget()


class Cell(NamedTuple):
    """One line of the table."""

    backend: str
    strategy: str
    rows: int
    direction: str  # "no grad", "forward with grad", "forward + backward"


class Cost(NamedTuple):
    """The time of a call, and that of allocating its outputs."""

    call: Timing
    outputs: Timing
    launches: int  # of one call; 0 without a stub

    @property
    def beyond(self) -> float:
        """Median microseconds of the call, less those of its outputs."""
        return (self.call.median - self.outputs.median) * 1e6


# Each strategy of the cuda path at sizes that it is meant for. Decoding is onepass at M ≤ 16.
SIZES = {
    "cuda": (("onepass", 1), ("onepass", 128), ("tail", 128), ("delta", 4)),
    "cpu": (("delta", 1),),
}
DIRECTIONS = ("no grad", "no grad, module", "forward with grad", "forward + backward")
K, N, R = 64, 64, 16  # the host's work does not depend on the size


def operands(rows: int, grad: bool) -> dict[str, Any]:
    """A bfloat16 layer. A quarter of its rows are active, at least one."""
    dtype = torch.bfloat16
    return {
        "x": torch.randn(rows, K).to(dtype).requires_grad_(grad),
        "weight": torch.randn(N, K).to(dtype),
        "bias": None,
        "lora_a": torch.randn(R, K).to(dtype).requires_grad_(grad),
        "lora_b": torch.randn(N, R).to(dtype).requires_grad_(grad),
        "activation": Activation.from_offsets([max(1, rows // 4)], rows),
        "scaling": 2.0,
    }


def build(cell: Cell) -> tuple[Callable[[], object], Callable[[], object]]:
    """A cell's call, and a call that only allocates its outputs."""
    with_grad = cell.direction.startswith("forward")
    given = operands(cell.rows, with_grad)
    x, lora_a, lora_b = given["x"], given["lora_a"], given["lora_b"]
    dy = torch.randn(cell.rows, N).to(x.dtype)

    def forward() -> Tensor:
        return alora_linear(**given, strategy=cell.strategy)

    module = AloraLinear(K, N, bias=False, r=R, lora_alpha=2 * R, dtype=x.dtype)
    module.requires_grad_(False).strategy = cell.strategy

    def layer() -> Tensor:
        return module(x, given["activation"])

    def both() -> object:
        return torch.autograd.grad(forward(), (x, lora_a, lora_b), dy)

    def outputs() -> object:
        return x.new_empty(cell.rows, N)

    def gradients() -> object:
        return outputs(), torch.empty_like(x), torch.empty_like(lora_a), torch.empty_like(lora_b)

    if cell.direction == "forward + backward":
        return both, gradients
    calls = {"no grad": forward, "no grad, module": layer, "forward with grad": forward}
    return calls[cell.direction], outputs


def cells(backends: Sequence[str]) -> Iterator[Cell]:
    """All cells to measure."""
    for backend in backends:
        for strategy, rows in SIZES[backend]:
            for direction in DIRECTIONS:
                yield Cell(backend, strategy, rows, direction)


def measure(cell: Cell, rounds: int, calls: int, stub: Stub) -> Cost:
    """Medians over `rounds` of `calls` calls. The call and its outputs are timed in turn."""
    # The call says "auto", as most users do, but only this backend is there to choose.
    one = {cell.backend: dispatch.BACKENDS[cell.backend]}
    grad = torch.set_grad_enabled(cell.direction.startswith("forward"))
    forget()
    with mock.patch.dict(dispatch.BACKENDS, one, clear=True), grad:
        return _measure(*build(cell), rounds, calls, stub)


def _measure(
    call: Callable[[], object], outputs: Callable[[], object], rounds: int, calls: int, stub: Stub
) -> Cost:
    for _ in range(20):  # fills the caches of plans and choices
        call()
        outputs()
    before = stub.launches
    call()
    launches = stub.launches - before
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, times in zip((call, outputs), samples):
            begin = time.thread_time()
            for _ in range(calls):
                function()
            times.append((time.thread_time() - begin) / calls)
    return Cost(Timing.of(samples[0]), Timing.of(samples[1]), launches)


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = flags.make_parser("host", __doc__)
    add = p.add_argument
    known, every = flags.names_of(BACKENDS), ",".join(BACKENDS)
    add("--backend", type=known, default=every, help="comma-separated, or all")
    add("--rounds", type=flags.above(1), default=200, help="medians are over these")
    add("--calls", type=flags.positive, default=20, help="timed together in a round")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    return flags.run(parser(), arguments, _print_costs)


def _print_costs(o: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    console = report.make_console()
    report.print_lines(console, describe_machine(torch.device("cpu")))
    words = ("backend", "strategy", "M", "call")
    figures = ("launches", "µs", "least", "±", "outputs µs", "beyond outputs µs")
    title = f"Host time of one call, launches stubbed (bf16, K={K}, N={N}, R={R})"
    table = report.make_table(title, (*words, *figures), left=words)
    with stubbed() as stub:
        for cell in cells(o.backend):
            cost = measure(cell, o.rounds, o.calls, stub)
            table.add_row(
                cell.backend,
                cell.strategy,
                str(cell.rows),
                cell.direction,
                str(cost.launches),
                f"{cost.call.median * 1e6:.1f}",
                f"{cost.call.least * 1e6:.1f}",
                f"{cost.call.spread:.0%}",
                f"{cost.outputs.median * 1e6:.1f}",
                f"{cost.beyond:.1f}",
            )
    console.print(table)
    return 0
