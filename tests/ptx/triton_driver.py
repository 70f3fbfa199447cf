"""A Triton driver that executes the compiled PTX on the CPU.

    with on_cpu("sm_90"):                  # compile for sm_90 and execute its PTX
        kernel[grid](x, y, M, BLOCK=128)   # CPU tensors

Triton compiles for the target as it would for a GPU; only loading and launching are replaced, so a
public call keeps its real path: the same wrapper, config, grid and kernel. `on_cpu` yields the
driver; after a launch `driver.machine` is the device that ran it (its counters are in `.count`),
and `driver.launches` are all of them.

`TargetDriver` and `active` serve every driver without a GPU, with every Triton from 3.2 on.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .machine import Machine
from .parser import Module

# Dynamic shared memory that one block may ask for, in bytes.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


Mutation = Callable[[str], str]
_mutants = itertools.count(1000)
# What load_binary returns: module, function, registers, spills, and threads since Triton 3.4.
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def loaded(module: Any, function: Any) -> tuple[Any, ...]:
    """What `utils.load_binary` of a driver returns to this Triton."""
    return (module, function, 0, 0, 1024)[: 5 if _VERSION >= (3, 4) else 4]


def decompose_descriptor(arg: Any) -> list[Any]:
    """The fields by which Triton passes a descriptor to a GPU without tensor maps."""
    try:
        from triton.backends.driver import decompose_descriptor as own
    except ImportError:  # before Triton 3.9
        from triton.backends.nvidia.driver import make_tensordesc_arg

        return list(make_tensordesc_arg(arg, None))
    return list(own(arg))


class TargetDriver(DriverBase):
    """A driver without a GPU, whose target is an arch (90, "gfx942"); a subclass launches."""

    def __init__(self, arch: int | str, device: int, utils: Any) -> None:
        self.device, self.utils = device, utils
        self.target = GPUTarget("cuda", arch, 32)
        if isinstance(arch, str):
            self.target = GPUTarget("hip", arch, 64)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

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
def active(mine: DriverBase, on_load: Callable[[Any], None]) -> Iterator[None]:
    """Launches in this context go to `mine`; `on_load` gets each compiled kernel before loading."""
    before, load = dict(vars(driver)), CompiledKernel._init_handles

    def noting(kernel: Any) -> None:
        if kernel.module is None:
            on_load(kernel)
        load(kernel)

    driver.set_active(mine)
    CompiledKernel._init_handles = noting
    try:
        yield
    finally:
        CompiledKernel._init_handles = load
        vars(driver).update(before)


# Two habits of Triton before 3.9. A reduction across warps loads partial results in some lanes and
# shuffles all; what the others send, nobody reads: here a NaN that is a large integer too.
_PARTIAL_LOAD = re.compile(r"^\s*@%p\d+ ld\.shared\.b32 (%r\d+),", re.M)
# And wgmma reads what cp.async brought without the proxy fence that PTX asks for.
_WAIT = re.compile(r"cp\.async\.wait_group\s+\d+;")


def readable(ptx: str) -> str:
    """The PTX without what Triton itself does against the rules that the interpreter holds."""
    if _VERSION >= (3, 9):
        return ptx
    ptx = _PARTIAL_LOAD.sub(r"mov.b32 \1, 0x7fbadbad; \g<0>", ptx)
    return _WAIT.sub(r"\g<0> fence.proxy.async.shared::cta;", ptx) if "wgmma" in ptx else ptx


class _Utils:
    def __init__(self, arch: int, mutate: Mutation | None, processors: int) -> None:
        self.arch, self.mutate, self.processors = arch, mutate, processors
        self.ptx = ""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_LIMIT[self.arch],
            "multiprocessor_count": self.processors,
            "warpSize": 32,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        text = readable(self.ptx)
        module = Module(self.mutate(text) if self.mutate else text)
        return loaded(module, (module, name))


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
        descriptors = iter(getattr(self.metadata, "tensordesc_meta", None) or [])
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


class CpuPtxDriver(TargetDriver):
    """An active driver whose target is `cuda:<arch>` and whose device is this interpreter."""

    def __init__(
        self, arch: int, mutate: Mutation | None = None, order: str = "lockstep", seed: int = 0,
        resident: int | None = None, processors: int = 132,
    ) -> None:  # fmt: skip
        # Triton keys its loaded kernels by device: one a target, and one for each mutation.
        device = next(_mutants) if mutate else arch
        super().__init__(arch, device, _Utils(arch, mutate, processors))
        self.order, self.seed, self.resident = order, seed, resident
        self.machine: Machine | None = None
        self.launches: list[Machine] = []

    def launcher_cls(self, src: Any, metadata: Any) -> _Launcher:
        return _Launcher(src, metadata)


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

    def remember(kernel: Any) -> None:
        mine.utils.ptx = kernel.asm["ptx"]

    with active(mine, remember):
        yield mine
