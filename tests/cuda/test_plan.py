"""Plans are pure functions of the problem: no GPU, no extension, no tensors."""

from __future__ import annotations

import pytest
import torch

from alora_kernels.backends.cuda import CudaBackend, plan_grads
from alora_kernels.backends.cuda import plan as planning
from alora_kernels.backends.cuda.backend import why_no_kernel
from alora_kernels.backends.cuda.plan import Operand
from alora_kernels.contract import Problem

BF16 = torch.bfloat16


def rows_of(length: int, aligned: bool = True) -> Operand:
    return Operand(length, 1, aligned)


def columns_of(length: int, aligned: bool = True) -> Operand:
    return Operand(1, length, aligned)


def gemm(m: int, n: int, k: int, multiprocessors: int = 108, **changes: object) -> planning.Plan:
    args = {
        "left": rows_of(k), "right": columns_of(k), "out": rows_of(n), "up": None, "down": None,
        "rank": 0, "adapter_float": False, "dropout": False, "add": False, "active_only": False,
    }  # fmt: skip
    args.update(changes)
    return planning.gemm(BF16, m, n, k, multiprocessors=multiprocessors, **args)


def test_gemm_takes_the_layout_it_can() -> None:
    orders = planning.ALONG_N | planning.STRIDED
    assert gemm(512, 512, 512).flags & orders == 0
    assert gemm(512, 512, 512, right=rows_of(512)).flags & orders == planning.ALONG_N
    for slow in (
        {"left": Operand(1024, 2, True)},
        {"left": rows_of(512, aligned=False)},
        {"right": columns_of(513)},
        {"right": Operand(2, 1024, True)},
    ):
        assert gemm(512, 512, 512, **slow).flags & orders == planning.STRIDED
    assert gemm(512, 512, 508).flags & orders == planning.STRIDED
    assert gemm(512, 508, 512, right=rows_of(508)).flags & orders == planning.STRIDED


@pytest.mark.parametrize("m, rows", [(1, 32), (32, 32), (64, 32), (512, 128), (8192, 128)])
def test_few_rows_take_small_tiles(m: int, rows: int) -> None:
    plan = gemm(m, 4096, 4096)
    assert f"_{rows}_kernel" in plan.kernel
    assert plan.grid == (-(-m // rows) * 32, 1, 1)


def test_gemm_fits_every_machine() -> None:
    for m in (16, 8192):
        for down in (None, rows_of(4096)):
            assert gemm(m, 4096, 4096, down=down).shared <= 99 * 1024


def test_up_goes_in_vectors_where_its_rows_allow() -> None:
    def vectors(n: int, rank: int, up: Operand, right: Operand, is_float: bool = False) -> bool:
        plan = gemm(512, n, 512, right=right, up=up, rank=rank, adapter_float=is_float)
        return bool(plan.flags & planning.VECTOR_UP)

    along_k, along_n = columns_of(512), rows_of(512)
    assert vectors(512, 24, columns_of(24), along_k)  # lora_bᵀ in forward
    assert vectors(512, 24, columns_of(24), along_k, True)
    assert vectors(512, 5, rows_of(512), along_n)  # lora_a in dx
    for slow in (
        (512, 12, columns_of(16), along_k),  # the last piece would run into the next row
        (512, 24, columns_of(28), along_k),
        (512, 24, columns_of(24, False), along_k),
        (512, 24, rows_of(512), along_k),
        (512, 24, columns_of(24), along_n),
    ):
        assert not vectors(*slow)
    for up, n, rank in ((columns_of(16), 35, 16), (rows_of(40), 40, 3)):
        plan = planning.expand_add(BF16, 9, n, rank, up, rows_of(n), False, False)
        assert plan.flags & planning.VECTOR_UP
        plan = planning.expand_add(BF16, 9, n - 1, rank - 1, up, rows_of(n), False, False)
        assert not plan.flags & planning.VECTOR_UP


def hopper(m: int, n: int, k: int, **changes: object) -> planning.Plan | None:
    args = {
        "left": rows_of(k), "right": columns_of(k), "low": rows_of(32), "up": columns_of(32),
        "out": rows_of(n), "adapter_float": False, "dropout": False, "add": False,
        "active_only": False, "multiprocessors": 132,
    }  # fmt: skip
    args.update(changes)
    return planning.gemm_sm90(BF16, m, n, k, 32, **args)


def test_hopper_tiles_and_maps() -> None:
    plan = hopper(8192, 4096, 4096)
    assert plan is not None and "_sm90nk_256_" in plan.kernel and plan.grid == (132, 1, 1)
    left, right, low, up, out = plan.maps
    assert left == ((4096, 8192), 8192, (64, 128)) and right == ((4096, 4096), 8192, (64, 256))
    assert low == ((32, 8192), 64, (64, 128)) and up == ((32, 4096), 64, (64, 256))
    assert out == ((4096, 8192), 8192, (64, 64))
    assert plan.shared <= 227 * 1024 and plan.dependent
    small = hopper(256, 4096, 4096)
    assert small is not None and "_sm90nk_128_" in small.kernel and small.grid == (64, 1, 1)
    assert small.shared <= 227 * 1024
    turned = hopper(8192, 4096, 4096, right=rows_of(4096), up=rows_of(4096))
    assert turned is not None and "_sm90kn_" in turned.kernel
    assert turned.maps[1] == ((4096, 4096), 8192, (64, 64))


def test_hopper_converts_what_no_map_can_hold() -> None:
    for change in ({"adapter_float": True}, {"up": columns_of(33)}, {"up": columns_of(32, False)}):
        plan = hopper(512, 512, 512, **change)
        assert plan is not None and plan.flags & planning.CONVERT_UP and plan.maps[3] is None


@pytest.mark.parametrize(
    "up, vector",
    [
        (columns_of(32), True),
        (columns_of(36), True),  # nine pieces of sixteen bytes
        (columns_of(34), False),
        (columns_of(32, False), False),
        (rows_of(512), False),
    ],
)
def test_hopper_reads_float_up_in_16_byte_pieces(up: Operand, vector: bool) -> None:
    plan = hopper(512, 512, 512, adapter_float=True, up=up)
    assert plan is not None and bool(plan.flags & planning.VECTOR_UP) == vector


def test_hopper_refuses_what_its_maps_cannot_hold() -> None:
    for change in (
        {"left": rows_of(513)},
        {"out": rows_of(512, False)},
        {"right": Operand(2, 2, True)},
    ):
        assert hopper(512, 512, 512, **change) is None
    assert hopper(64, 512, 512) is None and hopper(512, 512, 0) is None


@pytest.mark.parametrize("active", [0, 1, 127, 129, 8192])
@pytest.mark.parametrize("p, rank", [(1, 1), (4096, 32), (14336, 256)])
def test_grad_splits_cover_the_active_rows(active: int, p: int, rank: int) -> None:
    part, total = plan_grads.grad(BF16, active, p, rank, rows_of(p), False, True, 108)
    splits = part.grid[2]
    assert splits * part.split >= active and (splits - 1) * part.split < max(active, 1)
    assert part.split == total.split and part.workspace[0] == splits
    assert part.shared <= 99 * 1024


@pytest.mark.parametrize(
    "n, rank, active, ratio",
    [
        (4096, 16, 8192, 0.60),
        (4096, 32, 8192, 0.70),
        (4096, 32, 2048, 0.88),
        (4096, 32, 819, 0.76),
        (14336, 32, 8192, 0.64),
        (1024, 32, 8192, 0.89),
        (64, 32, 8192, 1.33),  # dya's part outweighs the second reading of so few columns
    ],
)
def test_grad_b_where_it_moves_fewer_bytes(n: int, rank: int, active: int, ratio: float) -> None:
    sizes = active, n, rank, 132
    one, two = plan_grads.one_pass_bytes(*sizes), plan_grads.two_pass_bytes(*sizes)
    assert one / two == pytest.approx(ratio, abs=0.005)
    plans = plan_grads.grad_b(BF16, active, n, rank, rows_of(n), False, 132)
    assert (plans is not None) == (one < two)


def test_grad_b_fills_the_machine_and_covers_rows_and_columns() -> None:
    for active, n, rank in ((8192, 4096, 32), (1, 136, 1), (8200, 14344, 17), (16, 520, 8)):
        plans = plan_grads.grad_b(BF16, active, n, rank, rows_of(n), False, 132)
        assert plans is not None
        both, sum_b, sum_low = plans
        parts, splits, _ = both.grid
        assert parts * 512 >= n > (parts - 1) * 512
        assert splits * both.split >= active > (splits - 1) * both.split
        assert parts * splits <= 132 and both.shared <= 99 * 1024
        assert both.workspace == (splits * n + parts * active, -(-rank // 16) * 16)
        assert sum_b.split == both.split and sum_low.split == 0
    full = plan_grads.grad_b(BF16, 8192, 4096, 32, rows_of(4096), False, 132)
    assert full is not None and full[0].grid == (8, 16, 1)


def test_grad_b_leaves_the_rest_to_two_passes() -> None:
    def plans(n: int = 4096, rank: int = 32, dy: Operand | None = None, active: int = 8192):
        return plan_grads.grad_b(BF16, active, n, rank, dy or rows_of(n), False, 132)

    assert plans() is not None
    assert plans(rank=33) is plans(n=4100) is plans(active=0) is None
    assert plans(dy=rows_of(4096, False)) is plans(dy=columns_of(4096)) is None


@pytest.mark.parametrize("k", [8, 512, 520, 4096, 14336])
@pytest.mark.parametrize("n", [1, 64, 4096])
def test_decode_slices_cover_k(n: int, k: int) -> None:
    plan = planning.decode(BF16, 4, n, k, 16, rows_of(k), rows_of(k), rows_of(k), False, 108)
    assert plan is not None
    tiles, slices, _ = plan.grid
    assert tiles == -(-n // 64) and slices * plan.split >= k > (slices - 1) * plan.split
    assert plan.workspace == ((slices, tiles, 16, 64) if slices > 1 else ())


def test_decode_leaves_the_rest_to_gemm() -> None:
    def plan(m: int = 4, k: int = 512, rank: int = 16, aligned: bool = True) -> object:
        x = rows_of(k, aligned)
        return planning.decode(BF16, m, 64, k, rank, x, rows_of(k), rows_of(k), False, 108)

    assert plan() is not None
    assert plan(m=17) is plan(k=12) is plan(rank=65) is plan(aligned=False) is None


def test_no_grid_is_too_large_for_millions_of_rows() -> None:
    rows, n = 1 << 24, 128256
    plans = [
        gemm(rows, n, 4096),
        planning.expand_add(BF16, rows, n, 256, columns_of(256), rows_of(n), False, False),
        planning.shrink(BF16, rows, n, rows_of(n), rows_of(n), 16, True, False, False, 108),
        *plan_grads.grad(BF16, rows, n, 256, rows_of(n), False, True, 108),
        planning.decode(BF16, 16, n, 4096, 16, *[rows_of(4096)] * 3, False, 108),
    ]
    for plan in plans:
        assert plan is not None
        assert plan.grid[0] < 1 << 31 and plan.grid[1] <= 65535 and plan.grid[2] <= 65535


PROBLEM = Problem(64, 64, (64,), (16,), 64, BF16, BF16, "cuda", 80)


@pytest.mark.parametrize(
    "changes, strategy, reason",
    [
        ({"dtype": torch.float32}, "delta", "torch.float32 has no CUDA kernel"),
        ({"adapter_dtype": torch.float16}, "delta", "adapters in torch.float16 over"),
        ({"adapter_precision": "fp32"}, "delta", "adapter_precision='fp32' has no CUDA kernel"),
        ({"ranks": (16, 257)}, "delta", "rank 257 is above 256"),
        ({"ranks": (65,)}, "onepass", "rank 65 is above 64"),
        ({"base_given": True}, "tail", "only 'delta' adds to it"),
        ({"strict_inactive": True}, "onepass", "strict_inactive needs 'delta'"),
        ({"dropout": True}, "onepass", "use 'tail' or 'delta'"),
    ],
)
def test_refusals_name_their_reason(changes: dict, strategy: str, reason: str) -> None:
    backend = CudaBackend(make_ready=lambda program: lambda inputs: None, machine=(108, 80))
    assert backend.why_not(PROBLEM, strategy) is None
    told = backend.why_not(PROBLEM._replace(**changes), strategy)
    assert told is not None and reason in told


@pytest.mark.parametrize(
    "here, archs, runs",
    [
        ((8, 0), ["sm_80"], True),
        ((8, 9), ["sm_80"], True),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100"], True),
        ((12, 0), ["sm_90a", "compute_80"], True),
        ((12, 0), ["sm_90a", "compute_90a"], False),
        ((7, 5), ["sm_80", "compute_80"], False),
        ((8, 0), [], False),
    ],
)
def test_which_gpu_runs_what_was_built(here: tuple[int, int], archs: list[str], runs: bool) -> None:
    told = why_no_kernel(*here, archs)
    assert (told is None) == runs
    assert runs or f"sm_{here[0]}{here[1]}" in str(told)
