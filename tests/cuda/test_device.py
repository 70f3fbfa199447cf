"""What only a GPU can tell of programs: graphs, streams, threads and other devices."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alora_kernels import Activation, alora_linear
from alora_kernels.backends.cuda import CudaBackend

WHY_NOT = CudaBackend().why_not_here()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

# Both count: decode with K in slices, and Hopper's persistent kernel (elsewhere an ordinary gemm).
SHAPES = [("onepass", 1), ("tail", 4096)]
K, N, R = 4096, 4096, 16


def layer(rows: int, device: str = "cuda") -> dict[str, object]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16() / shape[-1] ** 0.25

    return {
        "x": normal(rows, K), "weight": normal(N, K), "bias": None, "lora_a": normal(R, K),
        "lora_b": normal(N, R), "scaling": 1.0, "backend": "cuda",
        "activation": Activation.from_offsets([max(1, rows // 2)], rows, device=device),
    }  # fmt: skip


def call_and_result(
    strategy: str, rows: int, device: str = "cuda"
) -> tuple[Callable[[], Tensor], Tensor]:
    """A call, and what it gives when nothing runs beside it."""
    given = layer(rows, device)

    def call() -> Tensor:
        with torch.no_grad():
            return alora_linear(**given, strategy=strategy)  # type: ignore[arg-type]

    wanted = call()
    torch.cuda.synchronize(device)
    return call, wanted


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("strategy", "rows"), SHAPES)
def test_a_captured_call_is_replayed(strategy: str, rows: int, first: bool) -> None:
    """With calls beside it on another stream; `first`: nothing has run on that stream before."""
    call, wanted = call_and_result(strategy, rows)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    if not first:
        with torch.cuda.stream(side):
            call()
    with torch.cuda.graph(graph, stream=side):
        outs = [call(), call()]
    for _ in range(3):
        for out in outs:
            out.zero_()
        graph.replay()
        beside = [call() for _ in range(3)]
        torch.cuda.synchronize()
        for out in (*outs, *beside):
            assert torch.equal(out, wanted)


@pytest.mark.parametrize(("strategy", "rows"), SHAPES)
def test_streams_do_not_share_counters(strategy: str, rows: int) -> None:
    call, wanted = call_and_result(strategy, rows)
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    for _ in range(334):  # a thousand calls
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(call())
            if len(found) >= 100:
                torch.cuda.synchronize()
                assert all(torch.equal(y, wanted) for y in found)
                found.clear()
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in found)


@pytest.mark.parametrize(("strategy", "rows"), SHAPES)
def test_beside_kernels_that_hold_multiprocessors(strategy: str, rows: int) -> None:
    """Blocks that wait for each other must not need the whole GPU."""
    call, wanted = call_and_result(strategy, rows)
    busy = torch.randn(8192, 8192, device="cuda").bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        with torch.cuda.stream(side):
            for _ in range(3):
                torch.mm(busy, busy)
        found = [call() for _ in range(5)]
        torch.cuda.synchronize()
        assert all(torch.equal(y, wanted) for y in found)


@pytest.mark.parametrize(("strategy", "rows"), SHAPES)
def test_a_thread_without_a_context_launches(strategy: str, rows: int) -> None:
    """Its first call of CUDA, tensor maps included."""
    call, wanted = call_and_result(strategy, rows)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert len(found) == 1 and torch.equal(found[0], wanted)


def gradients(given: dict[str, object], strategy: str, dy: Tensor) -> list[Tensor]:
    """Of x, lora_a and lora_b."""
    names = ("x", "lora_a", "lora_b")
    leaves = {n: given[n].detach().requires_grad_() for n in names}  # type: ignore[attr-defined]
    y = alora_linear(**{**given, **leaves}, strategy=strategy)  # type: ignore[arg-type]
    return list(torch.autograd.grad(y, list(leaves.values()), dy))


@pytest.mark.parametrize(("strategy", "rows"), [("delta", 4096), ("onepass", 4096), *SHAPES])
def test_backward_is_the_first_call_of_a_thread(strategy: str, rows: int) -> None:
    """autograd runs it in a thread of its own, which may have no context yet."""
    given, dy = layer(rows), torch.randn(rows, N, device="cuda").bfloat16()
    wanted = gradients(given, strategy, dy)
    found: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(gradients(given, strategy, dy)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert len(found) == 1
    assert all(torch.equal(a, b) for a, b in zip(found[0], wanted, strict=True))


@pytest.mark.parametrize("strategy", ["delta", "tail", "onepass"])
def test_a_gradient_that_is_one_row_for_all(strategy: str) -> None:
    """`y.sum(0).backward()` hands over strides (0, 1): no tensor map, and the same numbers."""
    given, row = layer(4096), torch.randn(1, N, device="cuda").bfloat16()
    got = gradients(given, strategy, row.expand(4096, N))
    wanted = gradients(given, strategy, row.repeat(4096, 1))
    for a, b in zip(got, wanted, strict=True):  # other kernels, which round elsewhere
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()


@pytest.mark.parametrize(("strategy", "rows"), SHAPES)
def test_memory_of_a_graph_holds_no_counters(strategy: str, rows: int) -> None:
    """`torch.compile(mode="reduce-overhead")` refuses tensors in a graph's pool that outlive it."""
    given = layer(rows)
    compiled = torch.compile(
        lambda x: alora_linear(**{**given, "x": x}, strategy=strategy),  # type: ignore[arg-type]
        mode="reduce-overhead",
    )
    with torch.no_grad():
        wanted = alora_linear(**given, strategy=strategy)  # type: ignore[arg-type]
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(given["x"]), wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize(("strategy", "rows"), SHAPES)
def test_another_device_than_the_current_one(strategy: str, rows: int) -> None:
    before = torch.cuda.current_device()
    call, wanted = call_and_result(strategy, rows, "cuda:1")
    assert torch.equal(call(), wanted) and torch.cuda.current_device() == before
