"""A Triton driver that executes the compiled PTX on the CPU.

    with on_cpu("sm_90"):                  # compile for sm_90 and execute its PTX
        kernel[grid](x, y, M, BLOCK=128)   # CPU tensors

Triton compiles for the target as it would for a GPU; only loading and launching are replaced, so a
public call keeps its real path: the same wrapper, config, grid and kernel. `on_cpu` yields the
driver; after a launch `driver.machine` is the device that ran it (its counters are in `.count`),
and `driver.launches` are all of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase, decompose_descriptor
from triton.runtime import driver

from .machine import Machine
from .parser import Module

# Dynamic shared memory that one block may ask for, in bytes.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


Mutation = Callable[[str], str]
_mutants = itertools.count(1000)


class _Utils:
    def __init__(self, arch: int, mutate: Mutation | None, processors: int) -> None:
        self.arch, self.mutate, self.processors = arch, mutate, processors
        self.ptx_path = ""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_LIMIT[self.arch],
            "multiprocessor_count": self.processors,
            "warpSize": 32,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        with open(self.ptx_path) as f:
            text = f.read()
        module = Module(self.mutate(text) if self.mutate else text)
        return module, (module, name), 0, 0, 1024


class _Launcher:
    """Stands where CudaLauncher stands: Python arguments become device addresses."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.types = list(src.signature.values())
        self.metadata = metadata

    def __call__(
        self, gx, gy, gz, stream, function, packed, launch_metadata, enter, leave, *args
    ) -> None:
        module, name = function
        device: CpuPtxDriver = driver.active
        machine = Machine()
        storages: dict[int, tuple[int, torch.Tensor]] = {}
        values: list[Any] = []
        descriptors = iter(self.metadata.tensordesc_meta or [])
        for ty, arg in zip(self.types, args):
            if ty == "constexpr":
                continue
            if ty.startswith("tensordesc"):
                base, meta = _upload(machine, storages, arg.base), next(descriptors, None)
                if meta is None:  # no tensor maps on this arch: Triton passes the fields
                    _, *fields = decompose_descriptor(arg)
                    values += [base, *fields]
                    continue
                size = meta["elem_size"]
                strides = [s * size for s in reversed(arg.strides)][1:]
                box = meta["block_size"][::-1]
                dims = list(arg.shape)[::-1]
                values.append(machine.tensor_map(base, dims, strides, box, size, meta["swizzle"]))
                values += [*arg.shape, *arg.strides]
            elif ty.startswith("*"):
                values.append(0 if arg is None else _upload(machine, storages, arg))
            else:
                values.append(arg)
        threads = self.metadata.num_warps * 32
        cluster = getattr(self.metadata, "cluster_dims", (1, 1, 1))
        device.machine = machine
        device.launches.append(machine)
        machine.launch(
            module, name, (gx * cluster[0], gy * cluster[1], gz * cluster[2]), threads, values,
            smem=self.metadata.shared, cluster=cluster, order=device.order, seed=device.seed,
            resident=device.resident, reverse=device.order == "reverse",
        )  # fmt: skip
        for address, whole in storages.values():
            whole.copy_(torch.from_numpy(machine.get(address)))


def _upload(machine: Machine, storages: dict[int, tuple[int, torch.Tensor]], t: Any) -> int:
    """Device address of `t`; its whole storage goes over once, so views and strides just work."""
    storage = t.untyped_storage()
    if storage.data_ptr() not in storages:
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        storages[storage.data_ptr()] = (machine.put(whole.numpy()), whole)
    return storages[storage.data_ptr()][0] + t.storage_offset() * t.element_size()


class CpuPtxDriver(DriverBase):
    """An active driver whose target is `cuda:<arch>` and whose device is this interpreter."""

    def __init__(
        self, arch: int, mutate: Mutation | None = None, order: str = "lockstep", seed: int = 0,
        resident: int | None = None, processors: int = 132,
    ) -> None:  # fmt: skip
        self.arch, self.order, self.seed, self.resident = arch, order, seed, resident
        self.utils = _Utils(arch, mutate, processors)
        # Triton keys its loaded kernels by device: one a target, and one for each mutation.
        self.device = next(_mutants) if mutate else arch
        self.machine: Machine | None = None
        self.launches: list[Machine] = []

    def launcher_cls(self, src: Any, metadata: Any) -> _Launcher:
        return _Launcher(src, metadata)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        return triton.testing.do_bench

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@contextlib.contextmanager
def on_cpu(
    arch: int | str, mutate: Mutation | None = None, *, order: str = "lockstep", seed: int = 0,
    resident: int | None = None, processors: int = 132,
) -> Iterator[CpuPtxDriver]:  # fmt: skip
    """Run Triton launches in this context as PTX of `arch` (90, "sm_90" or "ptx:sm_90").

    `mutate` rewrites the PTX text before it is loaded, to seed a fault. `order`, `seed` and
    `resident` are those of `Machine.launch`; `processors` is the SM count that kernels are told.
    """
    number = int(str(arch).removeprefix("ptx:").removeprefix("sm_"))
    mine = CpuPtxDriver(number, mutate, order, seed, resident, processors)

    def remember(module: Any, function: Any, name: str, files: Any, digest: str) -> None:
        mine.utils.ptx_path = next(p for f, p in files.items() if f.endswith(".ptx"))

    active, hook = driver._active, knobs.runtime.kernel_load_start_hook
    driver.set_active(mine)
    knobs.runtime.kernel_load_start_hook = remember
    try:
        yield mine
    finally:
        driver._active = active
        knobs.runtime.kernel_load_start_hook = hook
