"""What the kernels move, counted by the interpreter and held against the floor of the problem."""

from __future__ import annotations

import pytest

from .cases import Case, run
from .ptx_sender import PtxSender

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned")]

M, N, K, R = 128, 128, 64, 32
SIZES = {"m": M, "n": N, "k": K, "r": R, "bias": "none"}


def launched(sender: PtxSender, word: str) -> str:
    names = {k for k in sender.kernels if word in k}
    assert len(names) == 1, names
    return names.pop()


@pytest.mark.parametrize(
    "active, low_bytes", [("all", 2 * M * R), ("half_tile", M * R), ("none", 0)]
)
def test_gemm_copies_each_operand_once_a_tile(active: str, low_bytes: int, seed: int) -> None:
    sender = run(Case("tail", active=active, machine=1, **SIZES), seed, backward=False)
    gemm = launched(sender, "gemm")
    assert sender.traffic(gemm, "cp.async", "bytes") == 2 * (M * K + N * K) + low_bytes
    assert sender.counts[gemm]["gl_st_bytes"] == 2 * M * N
    depth = K + (R if low_bytes else 0)  # a tile without an active row multiplies no R steps
    assert sender.counts[gemm]["mma_flops"] == 2 * M * N * depth


def test_gemm_reads_shared_memory_without_bank_conflicts(seed: int) -> None:
    for layout in ("plain", "weight_t"):
        sender = run(Case("tail", active="all", machine=1, layout=layout, **SIZES), seed)
        for gemm in {k for k in sender.kernels if "gemm" in k}:
            waves = sender.traffic(gemm, "ldmatrix", "wavefronts")
            assert waves == sender.traffic(gemm, "ldmatrix", "ideal") > 0


def test_grad_reads_shared_memory_without_bank_conflicts(seed: int) -> None:
    sender = run(Case("tail", active="all", **SIZES), seed)
    grad = launched(sender, "grad")
    waves = sender.traffic(grad, "ldmatrix", "wavefronts")
    assert waves == sender.traffic(grad, "ldmatrix", "ideal") > 0


def test_hopper_copies_whole_tiles_once(seed: int) -> None:
    sender = run(Case("tail", active="all", arch="sm_90a", machine=1, **SIZES), seed, False)
    gemm = launched(sender, "sm90")
    moved = sender.traffic(gemm, "cp.async.bulk.tensor.2d.shared", "bytes")
    assert moved == 2 * (M * K + N * K + M * R + N * R)
    assert sender.traffic(gemm, "cp.async.bulk.tensor.2d.global", "bytes") == 2 * M * N


def test_decode_reads_the_weight_once(seed: int) -> None:
    n, k = 136, 1032
    case = Case("onepass", m=9, n=n, k=k, r=16, bias="none", machine=4)
    sender = run(case, seed, backward=False)
    decode = launched(sender, "decode")
    assert sender.traffic(decode, "ld.global.cs", "bytes") == 2 * n * k


def test_shrink_reads_active_rows_of_x_once(seed: int) -> None:
    k = 520
    sender = run(Case("delta", m=40, n=16, k=k, r=64, active="half_tile"), seed, backward=False)
    shrink = launched(sender, "shrink")
    # 20 rows in two blocks of 16; 64 columns share one pass over x, every block reads lora_a.
    wide = sender.traffic(shrink, "ld.global.v4", "bytes")
    assert wide == 2 * (20 * k + 2 * 64 * k)
