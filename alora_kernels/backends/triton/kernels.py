"""From views to launches: each method states the shapes, chooses tile and grid, and adds steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...contract import Needs
from ...reference import dropout_threshold
from ..programs import Make, Torch, View, fresh
from . import configs, tune
from .configs import Config, rank_block
from .steps import ACTIVE, ROW_ADAPTER, SEED, Choice, Described, Launch, Step

GROUP = 8  # row tiles that share a column tile of the weight in L2
SHRINK_GROUP = 4  # projections that one launch of shrink serves


class Machine(NamedTuple):
    """What is planned for."""

    processors: int
    arch: int  # 80, 90, ...; 0 in the interpreter
    precision: str = "ieee"  # of float32 products: "ieee" or "tf32"
    descriptors: bool = True  # Triton has them on the host
    tune: bool = False  # candidates of configs are measured


class Pass(NamedTuple):
    """What a pass is asked for beside its tensors, and the machine that is planned for."""

    strategy: str
    scalings: tuple[float, ...]  # one for each projection
    max_active: int
    planned_active: int
    machine: Machine
    dropout_p: float = 0.0
    prefix_grad: bool = True
    low_dtype: torch.dtype = torch.bfloat16  # of xa and dya
    save: bool = False  # forward: keep xa for backward
    needs: Needs | None = None  # backward: the wanted gradients; None in forward


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(rank: int) -> int:
    """Columns of xa that a projection owns."""
    return cdiv(rank, 16) * 16


def parts(steps: int, wanted: int) -> tuple[int, int]:
    """How many parts of how many steps: no part is empty."""
    each = cdiv(steps, wanted)
    return cdiv(steps, each), each


def strides(name: str, view: View | None, *dimensions: str) -> dict[str, int]:
    """The fields `stride_{name}{dimension}` of a view; zeros where there is none."""
    values = (0,) * len(dimensions) if view is None else view.strides
    return {f"stride_{name}{d}": stride for d, stride in zip(dimensions, values)}


def rows_along(view: View | None, dimension: int) -> int:
    """How far a matrix's rows are apart where they lie along `dimension`, else 0.

    For operands that lie along the rank: a kernel that knows this number when it is compiled loads
    16 bytes at a time where the rank allows it. (Triton tells numbers by whether 16 divides them.)
    """
    return 0 if view is None or view.strides[dimension] != 1 else view.strides[1 - dimension]


class Product(NamedTuple):
    """out = [out +] left · right + bias + mask ⊙ (keep ⊙ (low · up) + scaling · lora_bias).

    Without `up` there is no adapter. With `down` low is formed here (`onepass`) and stored to `low`
    if that is given; without it `low` is read (`tail`).
    """

    left: View  # [M, K]
    right: View  # [K, N]
    out: View  # [M, N], contiguous
    bias: View | None = None
    down: View | None = None  # [K, R]
    low: View | None = None  # [M, R16]
    up: View | None = None  # [R, N]
    lora_bias: View | None = None
    scaling: float = 1.0
    dropout: bool = False
    add: bool = False
    active_only: bool = False

    @property
    def lora(self) -> str:
        """How low comes about."""
        return "none" if self.up is None else "tail" if self.down is None else "onepass"

    @property
    def rank(self) -> int:
        return 0 if self.up is None else self.up.shape[0]

    @property
    def layout(self) -> tuple[Any, ...]:
        """What a measurement depends on beside length, rank, dtype and alignment."""
        dtype = None if self.up is None else self.up.dtype
        return (
            *self.right.shape, self.right.strides[0] == 1, str(dtype), self.low is not None,
            self.active_only, rows_along(self.up, 0) > 0, rows_along(self.down, 1) > 0,
        )  # fmt: skip


class Kernels:
    """The steps of one pass, as they are added."""

    def __init__(self, asked: Pass) -> None:
        self.asked, self.machine = asked, asked.machine
        self.steps: list[Step] = []
        self._scratches = 0

    def make(self, name: str, shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> View:
        """A new tensor."""
        view = fresh(name, shape, dtype)
        self.steps.append(Make(view, zero))
        return view

    def torch(self, function: str, *operands: View | None, result: View | None = None) -> None:
        """What PyTorch computes."""
        self.steps.append(Torch(function, operands, result))

    def launch(self, kernel: str, grid: Sequence[int], config: Config, **fields: Any) -> None:
        """A kernel."""
        x, y, z = (*grid, 1, 1)[:3]
        self.steps.append(Launch(kernel, (x, y, z), fields, config.warps, config.stages))

    def _scratch(self, *shape: int) -> View:
        """A float32 tensor of the program's own."""
        self._scratches += 1
        return self.make(f"scratch {self._scratches}", shape, torch.float32)

    def _drop(self, wanted: bool) -> dict[str, Any]:
        """The fields that say what is dropped."""
        p = self.asked.dropout_p
        on = wanted and p > 0.0
        return {"seed": SEED if on else None, "threshold": dropout_threshold(p) if on else 0}

    def dense(self, vector: View | None) -> View | None:
        """`vector` as the kernels read it: elements side by side."""
        if vector is None or vector.strides == (1,) or vector.shape[0] <= 1:
            return vector
        result = fresh(f"dense {vector.tensor}", vector.shape, vector.dtype)
        self.torch("contiguous", vector, result=result)
        return result

    def shrink(
        self, left: View, rights: Sequence[View], scales: Sequence[float], columns: Sequence[int],
        out: View, *, dropout: bool, compact: bool = False,
    ) -> None:  # fmt: skip
        """out[active, column_i:] = scale_i · keep ⊙ left · right_iᵀ; left `[M, K]`, right_i
        `[R_i, K]`.

        out is `[M, ·]`, or `[active, ·]` with `compact`.
        """
        active, width = self.asked.max_active, left.shape[1]
        if active == 0:
            return
        like = (rights[0].strides, rights[0].dtype)
        size = SHRINK_GROUP if all((r.strides, r.dtype) == like for r in rights) else 1
        if len(rights) > size:
            for i in range(0, len(rights), size):
                j = i + size
                self.shrink(
                    left, rights[i:j], scales[i:j], columns[i:j], out, dropout=dropout,
                    compact=compact,
                )  # fmt: skip
            return
        cfg = configs.shrink_config(out.dtype)
        count, ranks = len(rights), [r.shape[0] for r in rights]
        block_r = rank_block(max(ranks))
        tiles_r = cdiv(max(ranks), block_r)
        tiles = cdiv(active, cfg.block_m) * count * tiles_r
        steps = cdiv(width, cfg.block_k)
        planned = cdiv(max(self.asked.planned_active, 1), cfg.block_m) * count * tiles_r
        wanted = configs.split_count(planned, steps, self.machine.processors, least_steps=4)
        splits, each = parts(steps, wanted)
        first, total = columns[0], columns[-1] - columns[0] + padded(ranks[-1])
        own = out.columns_from(first)
        to = own if splits == 1 else self._scratch(splits, active, total)

        def four(name: str, values: Sequence[Any], none: Any) -> dict[str, Any]:
            """The fields of up to four projections."""
            return {f"{name}{i}": v for i, v in enumerate([*values, *[none] * (4 - count)])}

        offsets = four("column", [c - first for c in columns], 0)
        del offsets["column0"]
        self.launch(
            "shrink", (tiles, splits), cfg, left=left, **four("right", rights, None), out=to,
            **ACTIVE, **four("scale", [float(s) for s in scales], 0.0), **self._drop(dropout),
            K=width, split_steps=each, part_rows=active, **strides("l", left, "m", "k"),
            **strides("r", rights[0], "r", "k"), stride_om=to.strides[-2], **offsets,
            **four("rank", ranks, 0), RIGHT_ROWS=rows_along(rights[0], 0), COUNT=count,
            COMPACT=compact, SPLIT=splits > 1, EVEN_K=width % cfg.block_k == 0, DTYPE=out.dtype,
            PRECISION=self.machine.precision, BLOCK_M=cfg.block_m, BLOCK_R=block_r,
            BLOCK_K=cfg.block_k, R_TILES=tiles_r,
        )  # fmt: skip
        if splits > 1:
            self.reduce(to, own, rows=not compact, active=True)

    def reduce(
        self, part: View, out: View, *, rows: bool = False, active: bool = False,
        bias: View | None = None, lora_bias: View | None = None, scaling: float = 1.0,
        add: bool = False, step_rows: int = 0,
    ) -> None:  # fmt: skip
        """out = [out +] Σ_s part[s] [+ bias] [+ scaling · mask ⊙ lora_bias]; part `[S, H, W]`.

        `active`: only the first active_count of the H rows exist; `rows`: row i goes to
        active_rows[i]. `step_rows`: the parts are those of `grad`, by steps of so many rows.
        """
        splits, height, width = part.shape
        block_j = rank_block(width, configs.REDUCE_ELEMENTS if height == 1 else 256)
        block_i = configs.REDUCE_ELEMENTS // block_j
        self.launch(
            "reduce", (cdiv(height, block_i), cdiv(width, block_j)), configs.REDUCE, part=part,
            out=out, bias=bias, lora_bias=lora_bias, **ACTIVE, row_adapter=ROW_ADAPTER,
            scaling=float(scaling), S=splits, H=height, W=width, **strides("o", out, "i", "j"),
            ACTIVE=active, ROWS=rows, ADD=add, STEP_ROWS=step_rows, UNROLL=configs.REDUCE_UNROLL,
            BLOCK_I=block_i, BLOCK_J=block_j,
        )  # fmt: skip

    def expand_add(
        self, low: View, right: View, out: View, bias: View | None, scaling: float,
        *, dropout: bool = False, compact: bool = False,
    ) -> None:  # fmt: skip
        """out[active] += low · right + scaling · bias; low `[M or active, R16]`, right `[R, N]`."""
        active, (rank, width) = self.asked.max_active, right.shape
        if active == 0 or width == 0:
            return
        cfg = configs.EXPAND_FLOAT32 if low.dtype == torch.float32 else configs.EXPAND
        self.launch(
            "expand_add", (cdiv(width, cfg.block_n) * cdiv(active, cfg.block_m),), cfg, low=low,
            right=right, bias=bias, out=out, **ACTIVE, **self._drop(dropout),
            scaling=float(scaling), N=width, stride_lm=low.strides[0],
            **strides("r", right, "r", "n"), **strides("o", out, "m", "n"), RANK=rank,
            RIGHT_ROWS=rows_along(right, 0), COMPACT=compact, DTYPE=low.dtype,
            PRECISION=self.machine.precision, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n,
            BLOCK_R=rank_block(rank, cfg.block_k),
        )  # fmt: skip

    def gemm(self, product: Product) -> None:
        """`product`, by the config for it and, where that is wanted or it asks for too much, by
        others."""
        left, right, machine = product.left, product.right, self.machine
        if left.shape[0] == 0 or right.shape[1] == 0:
            return
        aligned = _copied_whole(left) and _copied_whole(right)
        chosen: dict[str, Any] = {
            "arch": machine.arch, "rows": left.shape[0], "dtype": left.dtype,
            "precision": machine.precision, "lora": product.lora, "rank": product.rank,
            "dropout": self._drops(product), "descriptors": machine.descriptors,
        }  # fmt: skip
        default = configs.gemm_config(**chosen, aligned=aligned)
        measure = machine.tune and not product.add  # which gives another result each time
        tried = [default]
        if measure:
            tried = configs.gemm_candidates(default, machine.arch, left.dtype)
        tried.append(configs.gemm_config(**chosen, aligned=False))  # small enough for any GPU
        ways = {}
        for config in tried:
            own = Kernels(self.asked)
            own._tiled(product, config)
            ways[config] = tuple(own.steps)
        chosen["rows"] = tune.bucket(left.shape[0])
        key = ("gemm", *chosen.values(), aligned, machine.processors, *product.layout)
        self.steps.append(Choice(key if measure else (), ways))

    def _drops(self, product: Product) -> bool:
        return product.dropout and self.asked.dropout_p > 0.0 and product.up is not None

    def _tiled(self, product: Product, cfg: Config) -> None:
        """`product` by one config."""
        left, right, down, up, machine = (
            product.left, product.right, product.down, product.up, self.machine
        )  # fmt: skip
        (rows, depth), width = left.shape, right.shape[1]
        steps = cdiv(depth, cfg.block_k)
        wanted = configs.gemm_splits(rows, width, depth, cfg, machine.processors)
        splits, each = parts(steps, wanted)
        # A split writes float32 parts; what is added once waits for `reduce`.
        whole = splits == 1
        out, low = product.out, product.low
        stored = None if down is None else low  # onepass forms low, and may store it
        if not whole:
            out = self._scratch(splits, rows, width)
            if stored is not None:
                low = self._scratch(splits, rows, padded(product.rank))
        a: View | Described = left
        b: View | Described = right
        c: View | Described = out
        right_tma = ""
        if machine.descriptors and left.dtype != torch.float32:
            a = self._described(left, cfg.block_m, cfg.block_k)
            b = self._described(right, cfg.block_k, cfg.block_n)
            right_tma = "rows" if isinstance(b, Described) else ""
            if not right_tma:
                b = self._described(right.turned, cfg.block_n, cfg.block_k)
                right_tma = "columns" if isinstance(b, Described) else ""
                b = b if right_tma else right
            if whole and not product.add:
                c = self._described(out, cfg.block_m, cfg.block_n)
        self.launch(
            "gemm", (cdiv(rows, cfg.block_m) * cdiv(width, cfg.block_n), splits), cfg, left=a,
            right=b, bias=product.bias if whole else None, down=down, low=low, up=up,
            lora_bias=product.lora_bias if whole else None, out=c, row_adapter=ROW_ADAPTER,
            **self._drop(self._drops(product)), scaling=float(product.scaling), M=rows, N=width,
            K=depth, split_steps=each, **strides("l", left, "m", "k"),
            **strides("r", right, "k", "n"), **strides("d", down, "k", "r"),
            stride_wm=0 if low is None else low.strides[-2], **strides("u", up, "r", "n"),
            stride_om=out.strides[-2], LORA=product.lora, RANK=product.rank,
            UP_ROWS=rows_along(up, 0), DOWN_ROWS=rows_along(down, 1), ADD=whole and product.add,
            ACTIVE_ONLY=product.active_only, SPLIT=not whole, EVEN_K=depth % cfg.block_k == 0,
            LEFT_TMA=isinstance(a, Described), RIGHT_TMA=right_tma,
            OUT_TMA=isinstance(c, Described), DTYPE=left.dtype, PRECISION=machine.precision,
            BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
            BLOCK_R=configs.gemm_rank_block(product.rank, cfg, product.lora), GROUP=GROUP,
        )  # fmt: skip
        if not whole:
            self.reduce(
                out, product.out, bias=product.bias, lora_bias=product.lora_bias,
                scaling=product.scaling, add=product.add,
            )  # fmt: skip
            if stored is not None:
                assert low is not None
                self.reduce(low, stored)

    def _described(self, view: View, rows: int, columns: int) -> View | Described:
        """`view` by a descriptor, where one can stand for it."""
        fits = configs.can_describe(
            self.machine.arch, view.shape, view.strides, view.alignment, view.dtype.itemsize
        )
        return Described(view, (rows, columns)) if fits and view.offset == 0 else view

    def grad(
        self, wide: View, low: View, rank: int, out: View, *, transposed: bool = False,
        dropout: bool = False, sums: View | None = None, scaling: float = 1.0,
    ) -> None:  # fmt: skip
        """out `[P, R]` (`[R, P]` with `transposed`) = Σ_active wideᵀ · low; sums `[P]` gets
        scaling · Σ_active wide. low `[M, R16]`.
        """
        width = wide.shape[1]
        cfg, block_r = configs.grad_config(self.machine.arch, low.dtype, rank)
        tiles = (cdiv(width, cfg.block_n), cdiv(rank, block_r))
        splits = self._grad_splits(tiles[0] * tiles[1], cfg)
        part, part_sums = self._grad_parts(splits, out, sums)
        p, r = (1, width) if transposed else (rank, 1)
        self.launch(
            "grad", (*tiles, splits), cfg, wide=wide, low=low, part=part, sums=part_sums, **ACTIVE,
            **self._drop(dropout), scaling=float(scaling), P=width,
            **strides("w", wide, "m", "p"), stride_lm=low.strides[0], stride_ps=width * rank,
            stride_pp=p, stride_pr=r, RANK=rank, DTYPE=low.dtype, PRECISION=self.machine.precision,
            BLOCK_M=cfg.block_m, BLOCK_P=cfg.block_n, BLOCK_R=block_r,
        )  # fmt: skip
        self._grad_reduce(splits, cfg, part, out, part_sums, sums)

    def grad_b(
        self, dy: View, xa: View, lora_b: View, dya: View, out: View, *, scale: float,
        sums: View | None = None, scaling: float = 1.0,
    ) -> None:  # fmt: skip
        """out `[N, R]` = Σ_active dyᵀ · xa and dya[active] = scale · dy · lora_b, dy read once."""
        active, (width, rank), cfg = self.asked.max_active, lora_b.shape, configs.GRAD_BOTH
        blocks = cdiv(width, cfg.block_n)
        splits = self._grad_splits(blocks, cfg)
        part, part_sums = self._grad_parts(splits, out, sums)
        low = self._scratch(blocks, active, padded(rank))
        self.launch(
            "grad_b", (blocks, splits), cfg, dy=dy, xa=xa, lora_b=lora_b, part=part, dya_part=low,
            sums=part_sums, **ACTIVE, scale=float(scale), scaling=float(scaling), P=width,
            part_rows=active, **strides("y", dy, "m", "p"), stride_xm=xa.strides[0],
            **strides("b", lora_b, "p", "r"), stride_ps=width * rank, stride_pp=rank, stride_pr=1,
            RANK=rank, UP_ROWS=rows_along(lora_b, 1), DTYPE=xa.dtype,
            PRECISION=self.machine.precision, BLOCK_M=cfg.block_m, BLOCK_P=cfg.block_n,
            BLOCK_R=rank_block(rank),
        )  # fmt: skip
        self.reduce(low, dya, rows=True, active=True)
        self._grad_reduce(splits, cfg, part, out, part_sums, sums)

    def _grad_splits(self, tiles: int, cfg: Config) -> int:
        steps = max(1, cdiv(self.asked.max_active, cfg.block_m))
        return configs.split_count(tiles, steps, self.machine.processors, least_steps=4)

    def _grad_parts(self, splits: int, out: View, sums: View | None) -> tuple[View, View | None]:
        if splits == 1:
            return out, sums
        part = self._scratch(splits, *out.shape)
        return part, None if sums is None else self._scratch(splits, 1, sums.shape[0])

    def _grad_reduce(
        self, splits: int, cfg: Config, part: View, out: View, part_sums: View | None,
        sums: View | None,
    ) -> None:  # fmt: skip
        if splits == 1:
            return
        length = out.shape[0] * out.shape[1]  # both are contiguous: one long row
        flat = part._replace(shape=(splits, 1, length), strides=(length, length, 1))
        self.reduce(flat, _flat(out), step_rows=cfg.block_m)
        if sums is not None:
            assert part_sums is not None
            self.reduce(part_sums, _flat(sums), step_rows=cfg.block_m)


def _copied_whole(view: View) -> bool:
    """Whether a matrix can be read 16 bytes at a time, along its rows or its columns."""
    return configs.is_aligned(view.strides, view.alignment, view.dtype.itemsize)


def _flat(view: View) -> View:
    """A contiguous view as one row."""
    length = 1
    for size in view.shape:
        length *= size
    return view._replace(shape=(1, length), strides=(length, 1))
