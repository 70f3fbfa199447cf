"""What the kernels move, counted by the interpreter and held against the floor of the problem."""

from __future__ import annotations

import pytest

from alora_kernels.backends.cuda.plan_grads import one_pass_bytes

from .cases import Case, run
from .ptx_sender import PtxSender

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned")]

M, N, K, R = 128, 128, 64, 32
SIZES = {"m": M, "n": N, "k": K, "r": R, "bias": "none"}


def launched(sender: PtxSender, word: str) -> str:
    names = {k for k in sender.kernels if word in k}
    assert len(names) == 1, names
    return names.pop()


@pytest.mark.parametrize("active, rows", [("all", M), ("half_tile", M // 2), ("none", 0)])
def test_gemm_copies_each_operand_once_a_tile(active: str, rows: int, seed: int) -> None:
    sender = run(Case("tail", active=active, machine=1, **SIZES), seed, backward=False)
    gemm = launched(sender, "gemm")
    # A tile without an active row multiplies no R steps.
    depth, low = (K + R, 2 * R * (rows + N)) if rows else (K, 0)
    assert sender.traffic(gemm, "cp.async", "bytes") == 2 * (M * K + N * K) + low
    assert sender.counts[gemm]["gl_st_bytes"] == 2 * M * N
    assert sender.counts[gemm]["mma_flops"] == 2 * M * N * depth


@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("active, rows, row_tiles", [("half_tile", 150, 2), ("one", 1, 1)])
def test_tail_reads_each_operand_once_a_tile_pass(
    adapter: str, active: str, rows: int, row_tiles: int, seed: int
) -> None:
    """Passes of the schedule: 128 × 128 tiles of gemm; 16 rows and 64 columns of shrink."""
    m, n, k, r = 300, 264, 72, 24
    sizes = {"m": m, "n": n, "k": k, "r": r, "bias": "none", "machine": 1}
    sender = run(Case("tail", adapter=adapter, active=active, **sizes), seed, backward=False)
    gemm, size = launched(sender, "gemm_bf16_128"), 4 if adapter == "fp32" else 2
    main = 2 * (3 * m * k + 3 * n * k)  # x for each column of tiles, weight for each row of them
    low, up = 2 * 3 * rows * 32, row_tiles * size * n * r
    copied = sender.traffic(gemm, "cp.async", "bytes")
    assert copied == main + low + (up if adapter == "same" else 0)
    if adapter == "fp32":
        assert sender.traffic(gemm, "ld.global.v4", "bytes") == up
    shrink = launched(sender, "shrink")
    blocks = -(-rows // (32 if "_32_" in shrink else 16))
    wide = sender.traffic(shrink, "ld.global.v4", "bytes")
    assert wide == 2 * rows * k + blocks * size * r * k


def test_gemm_reads_shared_memory_without_bank_conflicts(seed: int) -> None:
    for layout in ("plain", "weight_t"):
        sender = run(Case("tail", active="all", machine=1, layout=layout, **SIZES), seed)
        for gemm in {k for k in sender.kernels if "gemm" in k}:
            waves = sender.traffic(gemm, "ldmatrix", "wavefronts")
            assert waves == sender.traffic(gemm, "ldmatrix", "ideal") > 0


def test_grads_read_shared_memory_without_bank_conflicts(seed: int) -> None:
    sender = run(Case("tail", active="all", **{**SIZES, "n": 264}), seed)
    for grad in ("masked_lora_grad_bf16_kernel", "masked_lora_grad_b_bf16_kernel"):
        waves = sender.traffic(grad, "ldmatrix", "wavefronts")
        assert waves == sender.traffic(grad, "ldmatrix", "ideal") > 0
    for opcode in ("st.shared", "ld.shared"):
        waves = sender.traffic(grad, opcode, "wavefronts")
        assert waves == sender.traffic(grad, opcode, "ideal") > 0


def test_grad_b_moves_the_bytes_that_the_plan_counts(seed: int) -> None:
    m, n, r, machine = 130, 1040, 9, 6  # three slices of columns, the last of sixteen; two of rows
    sizes = {"m": m, "n": n, "k": 8, "r": r, "bias": "none", "machine": machine}
    sender = run(Case("delta", active="all", **sizes), seed)
    assert sum("shrink" in k for k in sender.kernels) == 1  # xa's, and none for dya
    both = launched(sender, "grad_b_")
    assert sender.traffic(both, "cp.async", "bytes") == 2 * m * (n + 3 * 16)
    parts = 4 * 16 * (2 * n + 3 * m)
    assert sender.counts[both]["gl_st_bytes"] == parts
    assert one_pass_bytes(m, n, r, machine) == 2 * m * n + 2 * parts
    stages = 3 * 2 * 5  # of sixteen rows, for 65 in each split
    assert sender.counts[both]["mma_flops"] == 2 * 2 * stages * 16 * 512 * 16


def test_hopper_copies_whole_tiles_once(seed: int) -> None:
    case = Case("tail", active="all", arch="sm_90a", machine=1, dropout=0.3, **SIZES)
    sender = run(case, seed, False)
    gemm = launched(sender, "gemm")
    moved = sender.traffic(gemm, "cp.async.bulk.tensor.2d.shared", "bytes")
    assert moved == 2 * (M * K + N * K + M * R + N * R)
    assert sender.traffic(gemm, "cp.async.bulk.tensor.2d.global", "bytes") == 2 * M * N


@pytest.mark.parametrize("active, rows", [("all", 2 * M), ("half_tile", M)])
def test_the_persistent_kernel_makes_low_of_active_row_blocks_alone(
    active: str, rows: int, seed: int
) -> None:
    sizes = {**SIZES, "m": 2 * M}
    sender = run(Case("tail", active=active, arch="sm_90a", machine=1, **sizes), seed, False)
    fused = launched(sender, "sm90")
    moved = sender.traffic(fused, "cp.async.bulk.tensor.2d.shared", "bytes")
    # Per row block the ordinary tile, and where it is active a narrow one and the R steps.
    ordinary, blocks = 2 * (M * K + N * K), rows // M
    assert moved == 2 * ordinary + blocks * 2 * (M * K + R * K + M * R + N * R)
    assert sender.traffic(fused, "st.global", "bytes") == blocks * 2 * M * R
    assert sender.traffic(fused, "cp.async.bulk.tensor.2d.global", "bytes") == 2 * 2 * M * N


def test_hopper_reads_each_operand_once_a_tile_pass(seed: int) -> None:
    m, n, k, r = 256, 512, 64, 64
    case = Case(
        "tail", m=m, n=n, k=k, r=r, active="one", bias="none", machine=1, arch="sm_90a", dropout=0.3
    )
    sender = run(case, seed, backward=False)
    gemm = launched(sender, "sm90nk_256")  # 2 × 2 tiles; one row of them is active
    main = 2 * (2 * m * k + 2 * n * k)
    moved = sender.traffic(gemm, "cp.async.bulk.tensor.2d.shared", "bytes")
    assert moved == main + 2 * (2 * 128 * r + n * r)


@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize("strategy, dropout", [("tail", 0.3), ("tail", 0.0), ("onepass", 0.0)])
def test_hopper_converts_float_adapters_in_16_byte_pieces(
    strategy: str, dropout: float, dx: bool, seed: int
) -> None:
    m, n, k, r = 256, 384, 128, 32
    sizes = {"m": m, "n": n, "k": k, "r": r, "bias": "none", "machine": 1}
    case = Case(strategy, adapter="fp32", active="one", arch="sm_90a", dropout=dropout, **sizes)
    sender = run(case, seed, backward=dx)
    wide = launched(sender, "sm90_" if strategy == "onepass" else "sm90kn" if dx else "sm90nk")
    # One of two row blocks is active. Its tiles read up once, and down once for the narrow tile of
    # fused or for each column tile of onepass, which has 224 columns.
    columns, depth = (k, n) if dx else (n, k)
    passes = {"gemm": 0, "fused": 1, "onepass": -(-columns // 224)}[wide.split("_")[2]]
    moved = sender.traffic(wide, "ld.global.v4", "bytes")
    assert moved == 4 * r * (columns + passes * depth)
    # A chunk of 32 bytes is two loads of a lane: each touches every sector.
    assert sender.traffic(wide, "ld.global.v4", "sectors") == 2 * moved // 32


@pytest.mark.parametrize("active", ["all", "none"])
def test_onepass_of_hopper_multiplies_down_where_rows_are_active(active: str, seed: int) -> None:
    m, n, k, r = 128, 192, 128, 64
    case = Case("onepass", active=active, m=m, n=n, k=k, r=r, bias="none", arch="sm_90a", machine=1)
    sender = run(case, seed, backward=False)
    onepass = launched(sender, "sm90_192")
    moved = sender.traffic(onepass, "cp.async.bulk.tensor.2d.shared", "bytes")
    flops = sender.counts[onepass]["mma_flops"]
    on = active == "all"
    assert moved == 2 * (m * k + n * k + (r * k + n * r if on else 0))
    assert flops == 2 * m * (n * k + (r * k + n * r if on else 0))
    assert sender.traffic(onepass, "cp.async.bulk.tensor.2d.global", "bytes") == 2 * m * n


@pytest.mark.parametrize("m, machine", [(1, 1), (9, 4), (16, 1000)])
def test_decode_reads_the_weight_once(m: int, machine: int, seed: int) -> None:
    """Whatever the number of slices: no byte of it is read twice, and no sector in part."""
    n, k = 136, 1040
    case = Case("onepass", m=m, n=n, k=k, r=16, bias="none", machine=machine)
    sender = run(case, seed, backward=False)
    decode = launched(sender, "decode")
    assert sender.traffic(decode, "ld.global.cs", "bytes") == 2 * n * k
    assert sender.traffic(decode, "ld.global.cs", "sectors") == 2 * n * k // 32


def test_shrink_reads_active_rows_of_x_once(seed: int) -> None:
    k = 520
    sender = run(Case("delta", m=40, n=16, k=k, r=64, active="half_tile"), seed, backward=False)
    shrink = launched(sender, "shrink")
    # 20 rows in two blocks of 16; 64 columns share one pass over x, every block reads lora_a.
    wide = sender.traffic(shrink, "ld.global.v4", "bytes")
    assert wide == 2 * (20 * k + 2 * 64 * k)
