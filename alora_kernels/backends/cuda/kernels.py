"""From views to launches: each method states the shapes, plans, and adds one kernel's launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...contract import Needs
from ...reference import dropout_threshold
from ..programs import Make, Torch, View, fresh
from . import plan as planning
from . import plan_grads
from .params import MAX_COLUMN_BLOCKS
from .plan import Operand, Plan
from .steps import Counters, Launch, Step, operand_of

ROW_ADAPTER = fresh("row_adapter", (0,), torch.int32)
ACTIVE_ROWS = fresh("active_rows", (0,), torch.int32)
ACTIVE_COUNT = fresh("active_count", (1,), torch.int32)
SEED = fresh("seed", (1,), torch.int64)
ACTIVE = {"active_rows": ACTIVE_ROWS, "active_count": ACTIVE_COUNT}
NO_COLUMN: dict[str, Any] = {"right": None, "valid": 0, "scale": 0.0}


class Pass(NamedTuple):
    """What a pass is asked for beside its tensors, and the machine that is planned for."""

    strategy: str
    scalings: tuple[float, ...]  # one for each projection
    max_active: int
    multiprocessors: int
    arch: int  # 80, 90, ...
    dropout_p: float = 0.0
    prefix_grad: bool = True
    save: bool = False  # forward: keep xa for backward
    needs: Needs | None = None  # backward: the wanted gradients; None in forward


class Column(NamedTuple):
    """Sixteen columns of shrink's output, or fewer: scale · left · right[row : row + 16]."""

    right: View  # [R, K]
    row: int
    scale: float


def strides(name: str, view: View | None, *dimensions: str) -> dict[str, int]:
    """The fields `name_dimension` of `view`'s strides; zeros where there is no view."""
    values = (0,) * len(dimensions) if view is None else view.strides
    return {f"{name}_{d}": stride for d, stride in zip(dimensions, values)}


class Kernels:
    """The steps of one pass, as they are added."""

    def __init__(self, asked: Pass) -> None:
        self.asked = asked
        self.steps: list[Step] = []

    def make(self, name: str, shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> View:
        """A new tensor."""
        view = fresh(name, shape, dtype)
        self.steps.append(Make(view, zero))
        return view

    def torch(
        self, function: str, *operands: View | None, result: View | None,
        constants: tuple[Any, ...] = (),
    ) -> None:  # fmt: skip
        """What PyTorch computes."""
        self.steps.append(Torch(function, operands, result, constants))

    def launch(self, plan: Plan, **fields: Any) -> None:
        """A kernel. Every struct has the field `flags`, which the plan knows."""
        self.steps.append(Launch(plan, {**fields, "flags": plan.flags}))

    def _scratch(self, name: str, shape: Sequence[int]) -> View:
        """A float32 tensor of the program's own."""
        return self.make(f"{name} {len(self.steps)}", shape, torch.float32)

    def _dense(self, vector: View | None) -> View | None:
        """`vector` as the kernels read it: elements side by side."""
        if vector is None or vector.strides == (1,) or vector.shape[0] <= 1:
            return vector
        result = fresh(f"dense {vector.tensor}", vector.shape, vector.dtype)
        self.torch("contiguous", vector, result=result)
        return result

    def _drop(self, wanted: bool) -> tuple[bool, dict[str, Any]]:
        """Whether to drop, and the fields that say so."""
        p = self.asked.dropout_p
        on = wanted and p > 0.0
        return on, {"seed": SEED if on else None, "threshold": dropout_threshold(p)}

    def shrink(self, left: View, columns: Sequence[Column], out: View, dropout: bool) -> None:
        """out[active, 16·b + j] = scale_b · left · right_b[row_b + j]; left `[M, K]`.

        All rights have the same dtype and strides. Columns past a right's last row become zero.
        """
        active, k = self.asked.max_active, left.shape[1]
        if active == 0:
            return
        on, drop = self._drop(dropout)
        right = columns[0].right
        layout = operand_of(right)._replace(aligned=all(c.right.aligned for c in columns))
        even = all(c.right.shape[0] % 2 == 0 for c in columns)
        for begin in range(0, len(columns), MAX_COLUMN_BLOCKS):
            some = columns[begin : begin + MAX_COLUMN_BLOCKS]
            plan = planning.shrink(
                left.dtype, active, k, operand_of(left), layout, len(some), even,
                right.dtype != left.dtype, on, self.asked.multiprocessors,
            )  # fmt: skip
            table = [
                {"right": c.right.rows_from(c.row), "valid": min(16, c.right.shape[0] - c.row),
                 "scale": c.scale}
                for c in some
            ]  # fmt: skip
            table += [NO_COLUMN] * (MAX_COLUMN_BLOCKS - len(some))
            flat = {f"columns[{i}].{n}": v for i, c in enumerate(table) for n, v in c.items()}
            self.launch(
                plan, left=left, out=out.columns_from(16 * begin), **ACTIVE,
                **strides("left", left, "m", "k"), **strides("right", right, "r", "k"),
                **strides("out", out, "m"), k=k, blocks=len(some), **drop, **flat,
            )  # fmt: skip

    def gemm(
        self, left: View, right: View, out: View, *, bias: View | None = None,
        low: View | None = None, up: View | None = None, down: View | None = None,
        scale: float = 1.0, lora_bias: View | None = None, lora_bias_scale: float = 1.0,
        dropout: bool = False, add: bool = False, active_only: bool = False,
    ) -> None:  # fmt: skip
        """out = left · right + bias, and on active rows + low · up + lora_bias_scale · lora_bias.

        left `[M, K]`, right `[K, N]`, low `[M, R]`, up `[R, N]`. With `down` `[R, K]` (onepass)
        low = scale · left · downᵀ is computed here and also written to `low` unless that is None.
        """
        (m, k), n = left.shape, right.shape[1]
        if m == 0 or n == 0:
            return
        on, drop = self._drop(dropout)
        bias, lora_bias = self._dense(bias), self._dense(lora_bias)
        rank = 0 if up is None else up.shape[0]
        adapter = up if up is not None else lora_bias
        adapter_float = adapter is not None and adapter.dtype != left.dtype
        common = {
            "bias": bias, "lora_bias": lora_bias, "row_adapter": ROW_ADAPTER,
            **strides("up", up, "r", "n"), **strides("out", out, "m"),
            "m": m, "n": n, "k": k, "r": rank, "lora_bias_scale": lora_bias_scale, **drop,
        }  # fmt: skip
        machine = self.asked.multiprocessors
        wide = None
        if self.asked.arch == 90 and up is not None and down is not None and not on:
            wide = planning.onepass_sm90(
                left.dtype, m, n, k, rank, operand_of(left), operand_of(right), operand_of(up),
                operand_of(down), operand_of(out), adapter_float, add, active_only, machine,
            )  # fmt: skip
        elif self.asked.arch == 90 and down is None:
            wide = planning.gemm_sm90(
                left.dtype, m, n, k, rank, operand_of(left), operand_of(right),
                None if low is None else operand_of(low), None if up is None else operand_of(up),
                operand_of(out), adapter_float, on, add, active_only, machine,
            )  # fmt: skip
        if wide is not None and down is not None:
            self._launch_inside(
                wide, left, right, None, up, out, common, down, low, down_scale=scale,
            )  # fmt: skip
        elif wide is not None:
            self.launch(wide, **_mapped(left, right, low, up, out), **common)
        else:
            plan = planning.gemm(
                left.dtype, m, n, k, operand_of(left), operand_of(right), operand_of(out),
                None if up is None else operand_of(up),
                None if down is None else operand_of(down), rank, adapter_float, on, add,
                active_only, machine,
            )  # fmt: skip
            low_in, low_out = (low, None) if down is None else (None, low)
            self.launch(
                plan, left=left, right=right, low=low_in, up=up, down=down, out=out,
                low_out=low_out, **strides("left", left, "m", "k"),
                **strides("right", right, "k", "n"), **strides("low", low_in, "m"),
                **strides("down", down, "r", "k"), **strides("low_out", low_out, "m"),
                scale=scale, **common,
            )  # fmt: skip

    def _launch_inside(
        self, plan: Plan, left: View, right: View, low_map: View | None, up: View | None,
        out: View, common: dict[str, Any], down: View, low: View | None, down_scale: float,
        **more: Any,
    ) -> None:  # fmt: skip
        """A kernel of Hopper that makes low inside: its struct holds gemm's."""
        gemm = {**_mapped(left, right, low_map, up, out), **common, "flags": plan.flags}
        fields = {f"gemm.{name}": value for name, value in gemm.items()}
        fields |= {"down": down, "down_values": down, "low_out": low, "scale": down_scale}
        fields |= {**strides("down", down, "r", "k"), **strides("low", low, "m"), **more}
        self.steps.append(Launch(plan, fields))

    def plan_fused(
        self, left: View, right: View | None, up: View, down: View, columns: int,
        add: bool = False, active_only: bool = False,
    ) -> Plan | None:  # fmt: skip
        """The plan of `fused` with a fresh low `[M, columns]` and out, if it takes the problem."""
        m, k = left.shape
        if self.asked.arch != 90 or self.asked.dropout_p > 0.0 or right is None:
            return None
        n, rank = right.shape[1], up.shape[0]
        if 0 in (m, n, self.asked.max_active):
            return None
        return planning.fused_sm90(
            left.dtype, m, n, k, rank, operand_of(left), operand_of(right),
            Operand(columns, 1, True), operand_of(up), operand_of(down), Operand(n, 1, True),
            up.dtype != left.dtype, add, active_only, self.asked.multiprocessors,
        )  # fmt: skip

    def fused(
        self, plan: Plan, left: View, right: View, out: View, *, bias: View | None,
        low: View, up: View, down: View, scale: float, lora_bias: View | None = None,
        lora_bias_scale: float = 1.0,
    ) -> None:  # fmt: skip
        """low = scale · left · downᵀ on active rows, and gemm with it, by one launch.

        Operands as for `gemm`, down `[R, K]`; low may hold anything before, and is zero in the
        inactive rows of row blocks that have an active one.
        """
        (m, k), n = left.shape, right.shape[1]
        common = {
            "bias": self._dense(bias), "lora_bias": self._dense(lora_bias),
            "row_adapter": ROW_ADAPTER, "seed": None, **strides("up", up, "r", "n"),
            **strides("out", out, "m"), "m": m, "n": n, "k": k, "r": up.shape[0],
            "lora_bias_scale": lora_bias_scale, "threshold": 0,
        }  # fmt: skip
        self._launch_inside(
            plan, left, right, low, up, out, common, down, low, scale, **ACTIVE,
            ready=Counters(plan.counters),
        )  # fmt: skip

    def decode(
        self, x: View, weight: View, out: View, bias: View | None, up: View, down: View,
        lora_bias: View | None, scaling: float,
    ) -> bool:  # fmt: skip
        """`onepass` for at most sixteen rows x `[M, K]`, if decode takes the problem.

        weight `[N, K]`, out `[M, N]`, up `[R, N]`, down `[R, K]`.
        """
        (m, k), n, rank = x.shape, weight.shape[0], down.shape[0]
        plan = planning.decode(
            x.dtype, m, n, k, rank, operand_of(x), operand_of(weight), operand_of(down),
            down.dtype != x.dtype, self.asked.multiprocessors,
        )  # fmt: skip
        if plan is None:
            return False
        if m == 0 or n == 0:
            return True
        part = arrived = None
        if plan.workspace:
            part = self._scratch("part", plan.workspace)
            arrived = Counters(plan.grid[0])
        self.launch(
            plan, left=x, weight=weight, bias=self._dense(bias), up=up, down=down,
            lora_bias=self._dense(lora_bias), out=out, part=part, arrived=arrived,
            row_adapter=ROW_ADAPTER, **strides("left", x, "m"), **strides("weight", weight, "n"),
            **strides("up", up, "r", "n"), **strides("down", down, "r", "k"),
            **strides("out", out, "m"), m=m, n=n, k=k, r=rank, k_slice=plan.split, scale=scaling,
            lora_bias_scale=scaling,
        )  # fmt: skip
        return True

    def expand_add(
        self, low: View, up: View, out: View, lora_bias: View | None, lora_bias_scale: float,
        dropout: bool = False,
    ) -> None:  # fmt: skip
        """out[active] += low · up + lora_bias_scale · lora_bias; low `[M, R]`, up `[R, N]`."""
        active, (rank, n) = self.asked.max_active, up.shape
        if active == 0 or n == 0:
            return
        on, drop = self._drop(dropout)
        plan = planning.expand_add(
            low.dtype, active, n, rank, operand_of(up), operand_of(out), up.dtype != low.dtype, on
        )
        self.launch(
            plan, low=low, up=up, lora_bias=self._dense(lora_bias), out=out, **ACTIVE,
            **strides("low", low, "m"), **strides("up", up, "r", "n"),
            **strides("out", out, "m", "n"), n=n, r=rank, lora_bias_scale=lora_bias_scale, **drop,
        )  # fmt: skip

    def grad(self, wide: View, low: View, out: View, dropout: bool) -> None:
        """out = Σ_active wideᵀ · low; wide `[M, P]`, low `[M, ≥ R]`, out `[P, R]`."""
        active, (p, rank) = self.asked.max_active, out.shape
        if p == 0:
            return
        on, drop = self._drop(dropout)
        parts, total = plan_grads.grad(
            wide.dtype, active, p, rank, operand_of(wide), on, out.dtype == torch.float32,
            self.asked.multiprocessors,
        )  # fmt: skip
        part = self._scratch("part", parts.workspace)
        r16, rows = parts.workspace[2], parts.split
        if active > 0:
            self.launch(
                parts, wide=wide, low=low, part=part, **ACTIVE, **strides("wide", wide, "m", "p"),
                **strides("low", low, "m"), p=p, r16=r16, split_rows=rows, **drop,
            )  # fmt: skip
        self._reduce(total, part, out, rank, r16, rows)

    def grad_b(self, dy: View, xa: View, lora_b: View, dya: View, scale: float, db: str) -> bool:
        """`db` `[N, R]` = Σ_active dyᵀ · xa and dya[active] = scale · dy · lora_b, dy read once.

        False, and nothing is added, where two passes move fewer bytes. dy `[M, N]`, lora_b
        `[N, R]`, xa and dya `[M, ≥ R16]`: dya's padding columns become zero.
        """
        active, (n, rank) = self.asked.max_active, lora_b.shape
        plans = plan_grads.grad_b(
            dy.dtype, active, n, rank, operand_of(dy), lora_b.dtype != dy.dtype,
            self.asked.multiprocessors,
        )  # fmt: skip
        if plans is None:
            return False
        both, sum_b, sum_low = plans
        (parts, splits, _), rows, r16 = both.grid, both.split, both.workspace[1]
        part = self._scratch("part", both.workspace)
        low_part = part.rows_from(splits * n)
        self.launch(
            both, dy=dy, low=xa, up=lora_b, part=part, low_part=low_part, **ACTIVE,
            **strides("dy", dy, "m"), **strides("low", xa, "m"),
            **strides("up", lora_b, "n", "r"), n=n, r=rank, r16=r16, split_rows=rows,
            slots=active,
        )  # fmt: skip
        out = self.make(db, lora_b.shape, lora_b.dtype)
        self._reduce(sum_b, part, out, rank, r16, rows)
        self.launch(
            sum_low, part=low_part, out=dya, **ACTIVE, **strides("out", dya, "p", "r"), p=active,
            r=r16, r16=r16, split_rows=0, splits=parts, scale=scale,
        )  # fmt: skip
        return True

    def bias_gradient(self, name: str, dy: View, scaling: float, lora_bias: View) -> None:
        """scaling · Σ_active dy, as `lora_bias` is."""
        result = fresh(name, lora_bias.shape, lora_bias.dtype)
        constants = (scaling, lora_bias.dtype)
        self.torch("bias_gradient", ROW_ADAPTER, dy, result=result, constants=constants)

    def _reduce(self, plan: Plan, part: View, out: View, rank: int, r16: int, rows: int) -> None:
        """out `[P, R]`: the parts added up, each of so many active rows."""
        self.launch(
            plan, part=part, out=out, active_rows=None, active_count=ACTIVE_COUNT,
            **strides("out", out, "p", "r"), p=out.shape[0], r=rank, r16=r16, split_rows=rows,
            splits=0, scale=1.0,
        )  # fmt: skip


def _mapped(
    left: View, right: View, low: View | None, up: View | None, out: View
) -> dict[str, View | None]:
    """The fields of Hopper's gemm that map a matrix, and the addresses of those that may not."""
    return {
        "left": left, "right": right, "low": low, "up": up, "out": out, "up_values": up,
        "out_values": out,
    }  # fmt: skip
