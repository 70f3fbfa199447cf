"""The boundary to the extension: what a launch packs, and the extension where it is built."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import alora_kernels
from alora_kernels.activation import Activation
from alora_kernels.backends.cuda import CudaBackend, launch
from alora_kernels.backends.cuda.layouts import LAYOUTS
from alora_kernels.backends.cuda.plan import TensorMap
from alora_kernels.contract import Call, Projection


class Recorder:
    """Stands for alora_kernels._cuda."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def launch(self, *args: Any) -> None:
        self.launches.append(args)

    def tensor_map(self, address: int, is_bf16: bool, *sizes: int) -> bytes:
        return repr((address, is_bf16, *sizes)).encode().ljust(128)


def call_and_tensors(m: int, k: int, n: int, r: int) -> tuple[Call, torch.Tensor, Projection]:
    x, weight = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    a, b = torch.randn(r, k).bfloat16(), torch.randn(n, r).bfloat16()
    return Call(Activation.all(m), (1.5,)), x, Projection(weight, None, a, b, None)


@pytest.mark.parametrize(
    "multiprocessors, kernels",
    [
        (1, ["fused_bf16_sm90nk"]),
        (2, ["shrink_bf16_vector_32", "gemm_bf16_sm90nk_128_tail"]),
    ],
)
def test_a_launch_carries_the_plan_and_the_addresses(
    multiprocessors: int, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "alora_kernels._cuda", recorder)  # type: ignore[arg-type]
    monkeypatch.setattr(alora_kernels, "_cuda", recorder, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    call, x, p = call_and_tensors(128, 64, 128, 16)
    plans: list[tuple[Any, Any]] = []

    def send(plan: Any, fields: Any) -> None:
        plans.append((plan, fields))
        launch.send_to_gpu(plan, fields)

    (y,), _ = CudaBackend(send, (multiprocessors, 90)).forward(call, "tail", x, [p], None, False)
    assert [a[0] for a in recorder.launches] == [f"masked_lora_{k}_kernel" for k in kernels]
    for (plan, fields), args in zip(plans, recorder.launches):
        assert args[1:6] == (*plan.grid, plan.block, plan.shared) and args[8] == 77
        assert args[9:] == ("gemm" in plan.kernel, "fused" in plan.kernel)
        values = LAYOUTS[plan.params].unpack(args[6])
        for value, field, spec in zip(values, fields, [*plan.maps] + [None] * len(values)):
            if isinstance(spec, TensorMap):
                told = (field.data_ptr(), True, *spec.dims, spec.stride, *spec.box)
                assert value.rstrip() == repr(told).encode()
            elif isinstance(field, torch.Tensor):
                assert value == field.data_ptr()
            else:
                assert value == (0 if field is None else pytest.approx(field))
    assert plans[-1][1][len(plans[-1][0].maps) - 1] is y


def test_counters_are_one_tensor_a_stream_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_arrived", {})
    cpu = torch.device("cpu")
    first = launch.arrival_counters(cpu, 10)
    assert launch.arrival_counters(cpu, 1000) is first
    more = launch.arrival_counters(cpu, 5000)
    assert more.numel() >= 5000 and (more == 0).all()


def extension() -> Any:
    return pytest.importorskip("alora_kernels._cuda", reason="the extension is not built here")


def test_the_extension_knows_the_layouts_and_kernels() -> None:
    built = extension()
    assert built.param_sizes == {name: layout.size for name, layout in LAYOUTS.items()}
    names = built.kernel_names()
    assert len(set(names)) == len(names) and all(n.startswith("masked_lora_") for n in names)


def test_the_extension_refuses_what_it_does_not_know() -> None:
    built = extension()
    with pytest.raises(ValueError, match="no kernel is called nothing"):
        built.launch("nothing", 1, 1, 1, 32, 0, b"", 0, 0)
    with pytest.raises(ValueError, match=r"device 64 is outside 0\.\.63"):
        built.launch(built.kernel_names()[0], 1, 1, 1, 32, 0, b"", 64, 0)


@pytest.mark.parametrize(
    "versions, reason",
    [
        ((0, 13000), "no NVIDIA driver is installed"),
        ((12040, 13000), "the driver supports CUDA 12.4, the kernels were built with 13.0"),
    ],
)
def test_why_not_here(
    versions: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(versions=lambda: versions)
    monkeypatch.setitem(sys.modules, "alora_kernels._cuda", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(alora_kernels, "_cuda", fake, raising=False)
    from alora_kernels.backends.cuda.backend import _why_not_here

    assert reason in str(_why_not_here.__wrapped__())
