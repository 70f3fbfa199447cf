"""What a call costs and keeps: compiled kernels by signature, launched directly. Nothing runs."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from alora_kernels.activation import Activation
from alora_kernels.backends.programs import fresh, layouts_of
from alora_kernels.backends.triton import TritonBackend, run, target
from alora_kernels.backends.triton.kernels import Kernels, Machine, Pass, Product
from alora_kernels.backends.triton.program import program
from alora_kernels.backends.triton.steps import Choice, Launch, launches
from alora_kernels.contract import DEFAULTS, Call, Needs, Projection

from .compile_only import compile_only
from .conftest import CHOSEN

pytestmark = pytest.mark.skipif(CHOSEN == "interpret", reason="the interpreter launches nothing")

NEEDS = Needs(True, (True,), (True,), (True,))


class Given:
    """The tensors of a call."""

    def __init__(
        self, rows: int = 40, k: int = 64, n: int = 128, rank: int = 8, count: int = 1,
        dtype: torch.dtype = torch.bfloat16, p: float = 0.0, offset: int = 0,
    ) -> None:  # fmt: skip
        def tensor(*shape: int, of: torch.dtype = dtype) -> Tensor:
            size = torch.Size(shape).numel()
            return torch.zeros(size + offset, dtype=of)[offset:].view(shape)

        self.x = tensor(rows, k)
        self.projections = [
            Projection(tensor(n, k), tensor(n), tensor(rank, k), tensor(n, rank), tensor(n))
            for _ in range(count)
        ]
        self.dys = [tensor(rows, n) for _ in range(count)]
        activation = Activation.from_mask(torch.arange(rows) % 3 == 0)
        seed = torch.zeros(1, dtype=torch.int64) if p else None
        self.call = Call(activation, (2.0,) * count, DEFAULTS._replace(dropout_p=p), seed)

    def forward(self, backend: TritonBackend, strategy: str) -> tuple[list[Tensor], Any]:
        return backend.forward(self.call, strategy, self.x, self.projections, None, True)

    def both(self, backend: TritonBackend, strategy: str) -> list[Any]:
        ys, xa = self.forward(backend, "tail" if self.call.seed is not None else strategy)
        count = len(self.projections)
        needs = Needs(True, *((True,) * count,) * 3)
        grads = backend.backward(self.call, strategy, self.x, self.projections, xa, self.dys, needs)
        return [*ys, xa, grads.x, *grads.lora_a, *grads.lora_b, *grads.lora_bias]


@contextlib.contextmanager
def started(arch: int = 90) -> Iterator[list[tuple[Any, ...]]]:
    """What is handed to Triton's launchers: the kernel's name, grid, and arguments."""
    seen: list[tuple[Any, ...]] = []
    with compile_only(arch), pytest.MonkeyPatch.context() as patch:
        from triton.runtime import driver

        def launcher(src: Any, metadata: Any) -> Any:
            def launch(x, y, z, stream, function, packed, meta, enter, leave, *args) -> None:
                seen.append((metadata.name, (x, y, z), args))

            return launch

        patch.setattr(driver.active, "launcher_cls", launcher, raising=False)
        yield seen


def fields_of(found: tuple[Any, ...]) -> dict[str, Any]:
    name, _, arguments = found
    kernel = run.KERNELS[name.removeprefix("masked_lora_").removesuffix("_kernel")]
    return dict(zip(kernel.arg_names, arguments, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("strategy", ["delta", "tail", "onepass"])
def test_launched_directly_with_what_the_plan_says(strategy: str, p: float) -> None:
    """Every argument of every launch is the tensor or the number that the program names."""
    given = Given(count=2, p=p)
    forward = "tail" if p and strategy == "onepass" else strategy
    backend = TritonBackend()
    with started() as seen:
        for _ in range(2):
            seen.clear()
            ys, xa = given.forward(backend, forward)
        machine = Machine(target.NOMINAL_PROCESSORS, 90)
        active = given.call.activation.max_active
        asked = Pass(
            forward, (2.0, 2.0), active, active, machine, p, low_dtype=torch.bfloat16, save=True
        )
        planned = launches(program(asked, layouts_of(given.x, given.projections)))
    assert [s[0] for s in seen] == [f"masked_lora_{launch.kernel}_kernel" for launch in planned]
    first, second = given.projections
    activation = given.call.activation
    whole = {
        "x": given.x, "xa": xa, "y0": ys[0], "y1": ys[1], "weight0": first.weight,
        "weight1": second.weight, "bias0": first.bias, "bias1": second.bias,
        "lora_a0": first.lora_a, "lora_a1": second.lora_a, "lora_b0": first.lora_b,
        "lora_b1": second.lora_b, "lora_bias0": first.lora_bias, "lora_bias1": second.lora_bias,
        "row_adapter": activation.row_adapter, "active_rows": activation.active_rows,
        "active_count": activation.active_count, "seed": given.call.seed,
    }  # fmt: skip
    checked = 0
    for found, launch in zip(seen, planned):
        assert found[1] == launch.grid
        for name, got in fields_of(found).items():
            value = launch.fields[name]
            if isinstance(value, int | float | str):
                assert got == value, name
            view = getattr(value, "view", value)
            tensor = whole.get(getattr(view, "tensor", ""))
            if tensor is not None:
                base = getattr(got, "base", got)
                assert base.data_ptr() == tensor.data_ptr() + view.offset, name
                assert base.dtype == view.dtype, name
                checked += 1
            if got is not getattr(got, "base", got):
                assert (got.shape, got.strides) == (list(view.shape), list(view.strides))
    assert checked > 15


def test_nothing_of_a_call_is_kept() -> None:
    backend, freed = TritonBackend(), []
    with compile_only(90):
        for strategy in ("delta", "tail", "onepass"):
            given = Given(rows=16, k=512)
            results = given.both(backend, strategy)
            for t in (given.x, *given.dys, *given.projections[0], *results):
                weakref.finalize(t, freed.append, t.shape)
            del given, results, t
    gc.collect()
    assert len(freed) == 3 * (7 + 6)


def test_later_calls_compile_and_plan_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given, backend = Given(), TritonBackend()
    with started() as seen:
        given.both(backend, "tail")
        count = len(seen)
        monkeypatch.setattr(run, "compiled", lambda launch: pytest.fail("compiled again"))
        monkeypatch.setattr(
            "alora_kernels.backends.triton.backend.program",
            lambda *args: pytest.fail("planned again"),
        )
        given.both(backend, "tail")
        assert len(seen) == 2 * count


def test_unaligned_addresses_have_programs_of_their_own() -> None:
    """Layouts are the same, and so is the signature: only addresses tell them apart."""
    backend, whole, odd = TritonBackend(), Given(), Given(offset=1)
    with started(80) as seen:
        for given in (whole, odd, whole, odd):
            seen.clear()
            given.forward(backend, "tail")
            for found in seen:
                for name, got in fields_of(found).items():
                    if isinstance(got, Tensor) and name in ("left", "right"):
                        assert got.data_ptr() % 16 == given.x.data_ptr() % 16
    programs = set(backend._programs.values())
    assert len(programs) == 2 and len(backend._programs) == 3


def test_float32_settings_have_programs_of_their_own() -> None:
    backend, given = TritonBackend(), Given(dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        with started(80) as seen:
            for setting, meant in (("highest", "ieee"), ("high", "tf32"), ("highest", "ieee")):
                seen.clear()
                torch.set_float32_matmul_precision(setting)
                given.forward(backend, "tail")
                assert {fields_of(s)["PRECISION"] for s in seen if "PRECISION" in fields_of(s)} == {
                    meant
                }
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_config_that_asks_for_too_much_is_passed_over(monkeypatch, caplog) -> None:
    """A tuned or planned tile that does not fit: the next one runs, and the log says so."""
    from triton.runtime import driver

    given, backend = Given(rows=300), TritonBackend()
    with started(80) as seen:
        small = {"max_shared_mem": 50_000, "multiprocessor_count": 108, "warpSize": 32}
        monkeypatch.setattr(driver.active.utils, "get_device_properties", lambda device: small)
        given.forward(backend, "tail")
    (gemm,) = [fields_of(s) for s in seen if "gemm" in s[0]]
    assert (gemm["BLOCK_M"], gemm["BLOCK_N"]) == (64, 64)
    assert "does not fit this GPU" in caplog.text


def test_what_decides_a_tuned_config_is_in_its_key() -> None:
    """A config found for one product must not be taken for another that needs more memory."""
    rows, dtype = 512, torch.bfloat16
    x, w = fresh("x", (rows, 256), dtype), fresh("w", (128, 256), dtype)
    y = fresh("y", (rows, 128), dtype)

    def key(adapter: torch.dtype = dtype, store: bool = True, odd: int = 0, rank: int = 64) -> Any:
        a, b = fresh("a", (rank, 256), adapter), fresh("b", (128, rank), adapter)
        low = fresh("low", (rows, 64), dtype) if store else None
        left = x._replace(strides=(256 + odd, 1))
        kernels = Kernels(
            Pass("onepass", (1.0,), rows, rows, Machine(108, 80, tune=True), low_dtype=dtype)
        )
        kernels.gemm(Product(left, w.turned, y, down=a.turned, low=low, up=b.turned))
        (choice,) = kernels.steps
        assert isinstance(choice, Choice) and len(choice.ways) > 5
        return choice.key

    keys = [key(), key(adapter=torch.float32), key(store=False), key(odd=1), key(rank=32)]
    assert len(set(keys)) == len(keys)
    assert key() == key()


@pytest.mark.parametrize("name", ["active", "default"])
def test_cpu_tensors_start_no_driver(name: str) -> None:
    """In a process of its own: asking about a CPU tensor must not make a GPU's driver."""
    text = f"""
import torch
from triton.runtime import driver
def started(*a): raise AssertionError("the driver was started")
import triton.runtime.driver as module
module._create_driver = started
from alora_kernels import Activation, alora_linear
x, w = torch.randn(4, 8), torch.randn(8, 8)
a, b = torch.randn(2, 8), torch.randn(8, 2)
alora_linear(x, w, None, a, b, Activation.all(4), 1.0)
try:
    alora_linear(x, w, None, a, b, Activation.all(4), 1.0, backend="triton")
except RuntimeError as error:
    assert "the tensors are on cpu" in str(error), error
else:
    raise SystemExit("it ran")
assert getattr(driver, "_{name}", None) is None
"""
    subprocess.run([sys.executable, "-c", text], check=True)


def test_a_launch_that_lacks_a_parameter_says_which() -> None:
    with pytest.raises(TypeError, match=r"reduce: given without a parameter.*UNROLL"):
        run.compiled(Launch("reduce", (1, 1, 1), {"UNROLLED": 1}, 4, 1))
