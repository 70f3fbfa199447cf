"""The counters against known access patterns, and the traffic model against executed kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import Machine, Module
from .l2_traffic import Tile, replay
from .nvcc import WHY_NOT, module_of
from .report import efficiency, row

pytestmark = pytest.mark.ptx


def strided(step: int, space: str) -> str:
    """One warp reads words `step` apart."""
    read = f"ld.{space}.b32 %v, [%a];"
    where = "mov.b32 %b, buffer; cvt.u64.u32 %a, %b;" if space == "shared" else "mov.b64 %a, %p;"
    fill = "".join(
        f"add.s32 %c, %b, {4 * 32 * i}; mad.lo.s32 %c, %t, 4, %c; st.shared.b32 [%c], %t;\n"
        for i in range(step)
    )
    return f"""
.visible .entry k(.param .u64 p)
{{
.reg .b32 %t, %v, %b, %c; .reg .b64 %a, %p, %o;
.shared .align 4 .b8 buffer[4096];
mov.u32 %t, %tid.x; ld.param.u64 %p, [p];
{where}
{fill if space == "shared" else ""}
bar.sync 0;
mul.wide.u32 %o, %t, {4 * step}; add.s64 %a, %a, %o;
{read}
ret;
}}
"""


@pytest.mark.parametrize("step, sectors", [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_sectors_of_a_strided_load(step: int, sectors: int) -> None:
    gpu = Machine(1 << 20)
    gpu.launch(Module(strided(step, "global")), "k", (1,), 32, [gpu.put(np.zeros(1024, np.int32))])
    assert gpu.count["gl_ld_sectors"] == sectors
    assert efficiency(gpu, {"ld"}) == 4 / sectors


@pytest.mark.parametrize("step, waves", [(1, 1), (2, 2), (3, 1), (8, 8), (32, 32)])
def test_wavefronts_of_a_strided_shared_load(step: int, waves: int) -> None:
    gpu = Machine(1 << 20)
    gpu.launch(Module(strided(step, "shared")), "k", (1,), 32, [gpu.put(np.zeros(1, np.int32))])
    # The fill takes one wavefront a store.
    assert gpu.count["smem_wavefronts"] == step + waves
    assert gpu.count["smem_ideal"] == step + 1
    assert row(gpu)["conflicts"] == waves - 1


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_instructions_by_class(rng: np.random.Generator) -> None:
    gpu, n = Machine(1 << 20), 96
    x, out = gpu.put(np.zeros(n, np.float32)), gpu.empty((n,), np.float32)
    gpu.launch(module_of("ampere", "sm_80"), "axpy", (1,), 96, [x, x, out, 1.0, n])
    classes = gpu.reports[-1].instructions()
    assert classes["global"] == 3 * 3  # two loads and a store by each of three warps
    assert "tensor" not in classes and "sync" not in classes


def test_matmul_moves_what_the_traffic_model_says(rng: np.random.Generator) -> None:
    pytest.importorskip("triton")
    from .triton_driver import on_cpu
    from .triton_kernels import bf16, matmul_kernel

    M, N, K, block = 128, 192, 128, 64
    a, b, c = bf16(rng, M, K), bf16(rng, K, N), torch.full((M, N), torch.nan).bfloat16()
    with on_cpu("sm_80") as driver:
        matmul_kernel[(2, 3)](a, b, c, M, N, K, block, block, block, num_warps=4)
    machine = driver.machine
    assert machine is not None
    tile = Tile(block, block, block, 8)
    expected = replay(M, N, K, tile, 40 << 20, 108)
    assert machine.last["gl_ld_bytes"] == expected.l2
    assert expected.dram == 2 * (M * K + K * N)  # everything fits: each operand once
    assert machine.last["gl_st_bytes"] == 2 * M * N
    found = row(machine)
    assert found["load_efficiency"] == found["store_efficiency"] == 1.0
    assert found["conflicts"] == 0
    assert machine.last["mma_flops"] == 2 * M * N * K


def test_a_small_cache_reloads_and_a_large_one_does_not() -> None:
    shape = (4096, 4096, 1024)
    large = replay(*shape, Tile(), 1 << 40, 4)
    small = replay(*shape, Tile(), 1 << 20, 4)
    assert large.dram == 2 * (4096 * 1024 + 1024 * 4096)
    assert large.dram < small.dram <= small.l2 == large.l2
