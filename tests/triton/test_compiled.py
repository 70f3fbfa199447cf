"""What the compiler makes of every config in the table, for every GPU, without a GPU.

Compiled by the launchers' own code at real sizes: no spills, shared memory within the arch's limit,
and the tensor-core instruction that was meant. float32 under IEEE multiplies with FMA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from alora_kernels.activation import Activation
from alora_kernels.backends.triton import configs, launch, target
from alora_kernels.contract import DEFAULTS, Call

from .compile_only import Compiled, compile_only
from .conftest import CHOSEN

pytestmark = pytest.mark.skipif(CHOSEN == "interpret", reason="the interpreter compiles nothing")

ARCHS = (80, 90, 100, 120)
K = N = 4096
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


@pytest.fixture(autouse=True)
def as_many_processors_as_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "processors", lambda device: 132)


class Tensors:
    """Operands of one layer at a real size: allocated, never touched."""

    def __init__(
        self, rows: int, rank: int, dtype: torch.dtype, adapter: torch.dtype, odd: int = 0
    ):
        self.rows, self.rank, self.dtype = rows, rank, dtype
        self.x = torch.empty(rows, K + odd, dtype=dtype)[:, :K]
        self.weight = torch.empty(N, K + odd, dtype=dtype)[:, :K]
        self.bias = torch.empty(N, dtype=dtype)
        self.y = torch.empty(rows, N, dtype=dtype)
        self.a = torch.empty(rank, K, dtype=adapter)
        self.b = torch.empty(N, rank, dtype=adapter)
        self.lora_bias = torch.empty(N, dtype=adapter)
        self.low = torch.empty(rows, rank, dtype=dtype)
        activation = Activation.all(rows)
        self.call = Call(activation, (1.0,))
        self.dropped = Call(
            activation, (1.0,), DEFAULTS._replace(dropout_p=0.1), torch.zeros(1, dtype=torch.int64)
        )

    def gemms(self) -> dict[str, Callable[[], None]]:
        """The uses of `gemm` that reach every compile-time switch of it."""
        t, gemm = self, launch.gemm
        uses: dict[str, Callable[[], None]] = {
            "tail forward": lambda: gemm(
                t.call, t.x, t.weight.t(), t.y, bias=t.bias, low=t.low, up=t.b.t(),
                lora_bias=t.lora_bias,
            ),
            "tail dx, dropout": lambda: gemm(
                t.dropped, t.y, t.weight, t.x, low=t.low, up=t.a, dropout=True, active_only=True
            ),
            "tail dx, added": lambda: gemm(t.call, t.y, t.weight, t.x, low=t.low, up=t.a, add=True),
        }  # fmt: skip
        if t.rank <= configs.MAX_ONEPASS_RANK:
            uses |= {
                "onepass forward": lambda: gemm(
                    t.call, t.x, t.weight.t(), t.y, bias=t.bias, down=t.a.t(), low=t.low,
                    up=t.b.t(), lora_bias=t.lora_bias,
                ),
                "onepass dx": lambda: gemm(
                    t.call, t.y, t.weight, t.x, down=t.b, low=t.low, up=t.a, active_only=True
                ),
                "onepass dx, dropout": lambda: gemm(
                    t.dropped, t.y, t.weight, t.x, down=t.b, low=t.low, up=t.a, dropout=True,
                    add=True,
                ),
            }  # fmt: skip
        return uses

    def others(self) -> dict[str, Callable[[], None]]:
        t, r = self, self.rank
        wide = torch.empty(t.rows, 3 * r, dtype=t.dtype)
        return {
            "shrink, group, dropout": lambda: launch.shrink(
                t.dropped, t.x, [t.a] * 3, [1.0, 2.0, 3.0], [0, r, 2 * r], wide, dropout=True
            ),
            "shrink of dy": lambda: launch.shrink(
                t.call, t.y, [t.b.t()], [1.0], [0], t.low, dropout=False
            ),
            "expand_add": lambda: launch.expand_add(
                t.call, t.low, t.b.t(), t.y, t.lora_bias, 2.0, compact=True
            ),
            "expand_add, dropout": lambda: launch.expand_add(
                t.dropped, t.low, t.a, t.x, None, 1.0, dropout=True
            ),
            "grad of b": lambda: launch.grad(t.call, t.y, t.low, t.b, sums=t.lora_bias),
            "grad of a": lambda: launch.grad(
                t.dropped, t.x, t.low, t.a, transposed=True, dropout=True
            ),
            "grad_b": lambda: launch.grad_b(
                t.call, t.y, t.low, t.b, t.low, t.b, scale=1.0, sums=t.lora_bias
            ),
        }  # fmt: skip


def compiled(arch: int, what: str, use: Callable[[], None]) -> list[Compiled]:
    """Compiles `use` and checks what every kernel must keep."""
    with compile_only(arch) as kernels:
        use()
    assert kernels, f"{what}: nothing was compiled"
    for kernel in kernels:
        usage = kernel.usage()
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{what}: {kernel.name} spills: {usage}"
        limit = configs.SHARED_LIMIT[arch]
        assert kernel.shared <= limit, f"{what}: {kernel.name} asks for {kernel.shared} bytes"
    return kernels


def instruction(arch: int, block_m: int) -> str:
    return TENSOR_CORES[arch] if block_m >= 64 else "mma.sync"


def check_gemms(arch: int, tensors: Tensors, block_m: int) -> None:
    for name, use in tensors.gemms().items():
        what = f"sm_{arch} M={tensors.rows} R={tensors.rank} {name}"
        (kernel, *_) = compiled(arch, what, use)
        assert "gemm" in kernel.name
        meant = instruction(arch, block_m)
        assert meant in kernel.ptx, f"{what}: no {meant}"
        assert meant == "mma.sync" or "mma.sync.aligned" not in kernel.ptx, f"{what}: mma.sync left"


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 256, 4096])
@pytest.mark.parametrize("arch", ARCHS)
def test_gemm_configs(arch: int, rows: int) -> None:
    config = configs.gemm_config(arch, rows, torch.bfloat16, "ieee")
    # float32 adapters and the widest rank of onepass: the most registers.
    check_gemms(arch, Tensors(rows, 64, torch.bfloat16, torch.float32), config.block_m)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 256, 4096])
@pytest.mark.parametrize("arch", [86, 89])
def test_gemm_configs_of_small_shared_memory(arch: int, rows: int) -> None:
    if arch == 89 and configs.GEMM[89] == configs.GEMM[86]:
        for (_, a), (_, b) in zip(configs.GEMM[86], configs.GEMM[89]):
            assert a == b  # the same table: compiled once, as sm_86
        return
    tensors = Tensors(rows, 64, torch.bfloat16, torch.float32)
    for name in ("tail forward", "onepass forward", "onepass dx, dropout"):
        compiled(arch, f"sm_{arch} M={rows} {name}", tensors.gemms()[name])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_gemm_with_odd_strides_takes_pointers(arch: int) -> None:
    tensors = Tensors(4096, 24, torch.float16, torch.float16, odd=1)
    for name in ("tail forward", "onepass dx"):
        (kernel, *_) = compiled(arch, f"sm_{arch} odd {name}", tensors.gemms()[name])
        assert TENSOR_CORES[arch] in kernel.ptx, f"sm_{arch} odd {name}"
    aligned = Tensors(4096, 24, torch.float16, torch.float16)
    (kernel, *_) = compiled(arch, f"sm_{arch}", aligned.gemms()["tail forward"])
    loads = kernel.ptx.count("cp.async.bulk.tensor")
    assert (loads > 0) == (arch >= 90), f"{loads} TMA copies"
    assert arch >= 90 or "cp.async.cg" in kernel.ptx  # 16 bytes at a time


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_narrow_kernels(arch: int, dtype: torch.dtype) -> None:
    for rows, rank in ((4096, 32), (16, 256)):
        tensors = Tensors(rows, rank, dtype, torch.float32)
        for name, use in tensors.others().items():
            if name == "grad_b" and not configs.both_in_one_pass(N, rank, dtype):
                continue
            what = f"sm_{arch} {dtype} M={rows} R={rank} {name}"
            (kernel, *_) = compiled(arch, what, use)
            if dtype == torch.float32:
                assert "fma.rn.f32" in kernel.ptx and "mma." not in kernel.ptx, what
            else:
                assert "mma" in kernel.ptx, what


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 256])
@pytest.mark.parametrize("arch", ARCHS)
def test_ieee_float32(arch: int, rows: int) -> None:
    tensors = Tensors(rows, 64, torch.float32, torch.float32)
    for name in ("tail forward", "tail dx, dropout", "onepass forward", "onepass dx"):
        (kernel, *_) = compiled(arch, f"sm_{arch} M={rows} {name}", tensors.gemms()[name])
        assert "fma.rn.f32" in kernel.ptx and "mma." not in kernel.ptx


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 256])
@pytest.mark.parametrize("arch", ARCHS)
def test_tf32_when_torch_allows_it(arch: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "float32_precision", lambda: "tf32")
    tensors = Tensors(rows, 64, torch.float32, torch.float32)
    for name in ("tail forward", "tail dx, dropout", "onepass forward"):
        (kernel, *_) = compiled(arch, f"sm_{arch} tf32 M={rows} {name}", tensors.gemms()[name])
        assert "tf32" in kernel.ptx


def test_a_forward_kernel_compiles_for_sm_80() -> None:
    """The fast tier's share: the rest of this file is slow."""
    tensors = Tensors(16, 16, torch.bfloat16, torch.bfloat16)
    (kernel, reduce) = compiled(80, "sm_80", tensors.gemms()["tail forward"])
    assert "mma.sync" in kernel.ptx and "reduce" in reduce.name


def test_spills_are_found() -> None:
    """A tile too large for the registers must fail the check that the configs pass."""
    tensors = Tensors(4096, 64, torch.bfloat16, torch.float32)
    too_wide = configs.Config(128, 256, 32, 4, 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="spills"):
        patch.setattr(configs, "gemm_config", lambda *a, **k: too_wide)
        compiled(80, "too wide", tensors.gemms()["tail forward"])


@pytest.mark.parametrize("arch", [0, *configs.SHARED_LIMIT])
def test_pipelined_tiles_fit_shared_memory(arch: int) -> None:
    limit = configs.SHARED_LIMIT.get(arch, configs.GENERIC_LIMIT)
    for dtype, precision in (
        (torch.bfloat16, ""),
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
    ):
        for _, config in configs.gemm_table(arch, dtype, precision):
            assert config.shared_bytes(dtype.itemsize, configs.MAX_ONEPASS_RANK) <= limit
            for found in configs.gemm_candidates(config, arch, dtype)[1:]:
                assert found.shared_bytes(dtype.itemsize, configs.MAX_ONEPASS_RANK) <= limit


def test_an_unknown_gpu_takes_the_generic_row() -> None:
    known = configs.gemm_table(75, torch.bfloat16, "ieee")
    assert known == configs.GENERIC == configs.gemm_table(130, torch.bfloat16, "ieee")


@pytest.mark.parametrize("change", [{"block_m": 24}, {"block_n": 8}, {"warps": 3}, {"stages": 0}])
def test_a_config_states_its_constraints(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"Config\("):
        dataclasses.replace(configs.Config(64, 64, 64, 4, 2), **change)
