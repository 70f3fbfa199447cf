"""From tensors to launches: each function states the shapes, plans, and sends one kernel.

`send` takes a plan and the fields of its parameter struct in order, tensors standing for their
addresses or, where the plan has a tensor map, for the mapped matrix. Nothing here synchronises
with the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...contract import Call
from ...reference import dropout_threshold
from . import plan as planning
from . import plan_grads
from .layouts import LAYOUTS, MAX_COLUMN_BLOCKS
from .plan import Operand, Plan, operand

Send = Callable[[Plan, Sequence[Any]], None]
Column = tuple[Tensor, int, float]  # right, its first row, scale


def address_or_number(v: Any) -> int | float:
    """A field as struct packs it. Numbers come first: most fields are."""
    kind = type(v)
    if kind is int or kind is float:
        return v
    return 0 if v is None else v.data_ptr() if isinstance(v, Tensor) else v


def send_to_gpu(plan: Plan, fields: Sequence[Any]) -> None:
    """Launch on the current stream of the device that the tensors lie on."""
    from ... import _cuda

    device = next(v for v in fields if isinstance(v, Tensor)).get_device()
    maps = len(plan.maps)
    values: list[Any] = [
        b"" if spec is None else _cuda.tensor_map(
            tensor.data_ptr(), tensor.dtype == torch.bfloat16, *spec.dims, spec.stride, *spec.box
        )
        for spec, tensor in zip(plan.maps, fields)
    ]  # fmt: skip
    values += [address_or_number(v) for v in fields[maps:]]
    data = LAYOUTS[plan.params].pack(*values)
    stream = torch._C._cuda_getCurrentRawStream(device)
    _cuda.launch(*launch_head(plan), data, device, stream, *launch_options(plan))


def launch_head(plan: Plan) -> tuple[str, int, int, int, int, int]:
    """The arguments of `_cuda.launch` before the parameters."""
    return (plan.kernel, *plan.grid, plan.block, plan.shared)


def launch_options(plan: Plan) -> tuple[bool, bool]:
    """The arguments of `_cuda.launch` after the stream."""
    return (plan.dependent, plan.cooperative)


_arrived: dict[tuple[torch.device, int], Tensor] = {}


def arrival_counters(device: torch.device, count: int) -> Tensor:
    """At least `count` zeros that the last block to arrive sets back to zero.

    One tensor for each stream, so that kernels of two streams never share a counter. A graph that
    is being captured gets its own, zeroed at each replay.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    found = _arrived.get((device, stream))
    if found is None or found.numel() < count:
        found = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _arrived[device, stream] = found
    return found


def is_counters(tensor: Tensor) -> bool:
    """Whether `tensor` is what `arrival_counters` gave outside a graph."""
    return any(tensor is found for found in list(_arrived.values()))


def dense(vector: Tensor | None) -> Tensor | None:
    """`vector` as the kernels read it: elements side by side."""
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


@dataclass(frozen=True)
class Launcher:
    """Kernels of one call. `multiprocessors` is what the plans fill, `arch` as 80, 90, ..."""

    send: Send
    call: Call
    multiprocessors: int
    arch: int

    def vendor(self, function: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
        """`function(*operands)`, a product by the vendor's library."""
        watched = getattr(self.send, "vendor", None)
        return function(*operands) if watched is None else watched(function, *operands)

    def _drop(self, wanted: bool) -> tuple[bool, Tensor | None, int]:
        on = wanted and self.call.options.dropout_p > 0.0
        return on, self.call.seed if on else None, dropout_threshold(self.call.options.dropout_p)

    def shrink(self, left: Tensor, columns: Sequence[Column], out: Tensor, dropout: bool) -> None:
        """out[active, 16·b + j] = scale_b · left · right_b[row_b + j]; left `[M, K]`.

        A column block is a right `[R, K]`, the row of its first column, and its scale. All rights
        have the same dtype and strides. Columns past a right's last row become zero.
        """
        act, k = self.call.activation, left.shape[1]
        if act.max_active == 0:
            return
        on, seed, threshold = self._drop(dropout)
        right = columns[0][0]
        adapter_float = right.dtype != left.dtype
        layout = operand(right)
        if any(c[0].data_ptr() % 16 for c in columns):
            layout = layout._replace(aligned=False)
        even = all(c[0].shape[0] % 2 == 0 for c in columns)
        for begin in range(0, len(columns), MAX_COLUMN_BLOCKS):
            some = columns[begin : begin + MAX_COLUMN_BLOCKS]
            target = out[:, 16 * begin :] if begin else out
            plan = planning.shrink(
                left.dtype, act.max_active, k, operand(left), layout, len(some), even,
                adapter_float, on, self.multiprocessors,
            )  # fmt: skip
            table: list[Any] = []
            for tensor, row, scale in some:
                table += [tensor[row:] if row else tensor, min(16, tensor.shape[0] - row), scale]
            table += [0, 0, 0.0] * (MAX_COLUMN_BLOCKS - len(some))
            self.send(plan, (
                left, target, act.active_rows, act.active_count, seed, *left.stride(),
                *right.stride(), out.stride(0), k, len(some), threshold, plan.flags, *table,
            ))  # fmt: skip

    def gemm(
        self, left: Tensor, right: Tensor, out: Tensor, *, bias: Tensor | None = None,
        low: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None,
        scale: float = 1.0, lora_bias: Tensor | None = None, lora_bias_scale: float = 1.0,
        dropout: bool = False, add: bool = False, active_only: bool = False,
    ) -> None:  # fmt: skip
        """out = left · right + bias, and on active rows + low · up + lora_bias_scale · lora_bias.

        left `[M, K]`, right `[K, N]`, low `[M, R]`, up `[R, N]`. With `down` `[R, K]` (onepass)
        low = scale · left · downᵀ is computed here and also written to `low` unless that is None.
        """
        (m, k), n = left.shape, right.shape[1]
        if m == 0 or n == 0:
            return
        on, seed, threshold = self._drop(dropout)
        bias, lora_bias = dense(bias), dense(lora_bias)
        adapter = up if up is not None else lora_bias
        if self.arch == 90 and up is not None and down is not None and not on:
            wide = planning.onepass_sm90(
                left.dtype, m, n, k, up.shape[0], operand(left), operand(right), operand(up),
                operand(down), operand(out), up.dtype != left.dtype, add, active_only,
                self.multiprocessors,
            )  # fmt: skip
            if wide is not None:
                self.send(wide, (
                    down, left, right, None, up, out, bias, up, lora_bias, out,
                    self.call.activation.row_adapter, None, *up.stride(), out.stride(0), m, n, k,
                    up.shape[0], lora_bias_scale, 0, wide.flags, 0, down, low, *down.stride(),
                    0 if low is None else low.stride(0), scale, 0,
                ))  # fmt: skip
                return
        if self.arch == 90 and down is None and self._gemm_sm90(
            left, right, out, bias, low, up, lora_bias, lora_bias_scale, on, seed, threshold, add,
            active_only,
        ):  # fmt: skip
            return
        plan = planning.gemm(
            left.dtype, m, n, k, operand(left), operand(right), operand(out),
            None if up is None else operand(up), None if down is None else operand(down),
            0 if up is None else up.shape[0],
            adapter is not None and adapter.dtype != left.dtype, on, add, active_only,
            self.multiprocessors,
        )  # fmt: skip
        low_in, low_out = (low, None) if down is None else (None, low)
        self.send(plan, (
            left, right, bias, low_in, up, down, lora_bias, out, low_out,
            self.call.activation.row_adapter, seed, *left.stride(), *right.stride(),
            0 if low_in is None else low_in.stride(0), *((0, 0) if up is None else up.stride()),
            *((0, 0) if down is None else down.stride()), out.stride(0),
            0 if low_out is None else low_out.stride(0), m, n, k,
            0 if up is None else up.shape[0], scale, lora_bias_scale, threshold, plan.flags,
        ))  # fmt: skip

    def plan_fused(
        self, left: Tensor, right: Tensor | None, up: Tensor, down: Tensor, columns: int,
        add: bool = False, active_only: bool = False,
    ) -> Plan | None:  # fmt: skip
        """The plan of `fused` with a fresh low `[M, columns]` and out, if it takes the problem."""
        m, k = left.shape
        if self.arch != 90 or self.call.options.dropout_p > 0.0 or right is None:
            return None
        n, rank = right.shape[1], up.shape[0]
        if 0 in (m, n, self.call.activation.max_active):
            return None
        return planning.fused_sm90(
            left.dtype, m, n, k, rank, operand(left), operand(right), Operand(columns, 1, True),
            operand(up), operand(down), Operand(n, 1, True), up.dtype != left.dtype, add,
            active_only, self.multiprocessors,
        )  # fmt: skip

    def fused(
        self, plan: Plan, left: Tensor, right: Tensor, out: Tensor, *, bias: Tensor | None,
        low: Tensor, up: Tensor, down: Tensor, scale: float, lora_bias: Tensor | None = None,
        lora_bias_scale: float = 1.0,
    ) -> None:  # fmt: skip
        """low = scale · left · downᵀ on active rows, and gemm with it, by one launch.

        Operands as for `gemm`, down `[R, K]`; low may hold anything before, and is zero in the
        inactive rows of row blocks that have an active one.
        """
        (m, k), n, act = left.shape, right.shape[1], self.call.activation
        self.send(plan, (
            down, left, right, low, up, out, dense(bias), up, dense(lora_bias), out,
            act.row_adapter, None, *up.stride(), out.stride(0), m, n, k, up.shape[0],
            lora_bias_scale, 0, plan.flags, 0, down, low, act.active_rows, act.active_count,
            arrival_counters(left.device, plan.counters), *down.stride(), low.stride(0), scale, 0,
        ))  # fmt: skip

    def decode(
        self, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, up: Tensor,
        down: Tensor, lora_bias: Tensor | None, scaling: float,
    ) -> bool:  # fmt: skip
        """`onepass` for at most sixteen rows x `[M, K]`, if decode takes the problem.

        weight `[N, K]`, out `[M, N]`, up `[R, N]`, down `[R, K]`.
        """
        (m, k), n, rank = x.shape, weight.shape[0], down.shape[0]
        plan = planning.decode(
            x.dtype, m, n, k, rank, operand(x), operand(weight), operand(down),
            down.dtype != x.dtype, self.multiprocessors,
        )  # fmt: skip
        if plan is None:
            return False
        if m == 0 or n == 0:
            return True
        part = arrived = None
        if plan.workspace:
            part = torch.empty(plan.workspace, dtype=torch.float32, device=x.device)
            arrived = arrival_counters(x.device, plan.grid[0])
        self.send(plan, (
            x, weight, dense(bias), up, down, dense(lora_bias), out, part, arrived,
            self.call.activation.row_adapter, x.stride(0), weight.stride(0), *up.stride(),
            *down.stride(), out.stride(0), m, n, k, rank, plan.split, scaling, scaling, plan.flags,
        ))  # fmt: skip
        return True

    def _gemm_sm90(
        self, left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None, low: Tensor | None,
        up: Tensor | None, lora_bias: Tensor | None, lora_bias_scale: float, dropout: bool,
        seed: Tensor | None, threshold: int, add: bool, active_only: bool,
    ) -> bool:  # fmt: skip
        """The same by Hopper's kernel, if it takes the problem."""
        (m, k), n = left.shape, right.shape[1]
        rank = 0 if up is None else up.shape[0]
        adapter = up if up is not None else lora_bias
        plan = planning.gemm_sm90(
            left.dtype, m, n, k, rank, operand(left), operand(right),
            None if low is None else operand(low), None if up is None else operand(up),
            operand(out), adapter is not None and adapter.dtype != left.dtype, dropout, add,
            active_only, self.multiprocessors,
        )  # fmt: skip
        if plan is None:
            return False
        self.send(plan, (
            left, right, low, up, out, bias, up, lora_bias, out,
            self.call.activation.row_adapter, seed, *((0, 0) if up is None else up.stride()),
            out.stride(0), m, n, k, rank, lora_bias_scale, threshold, plan.flags, 0,
        ))  # fmt: skip
        return True

    def expand_add(
        self, low: Tensor, up: Tensor, out: Tensor, lora_bias: Tensor | None,
        lora_bias_scale: float, dropout: bool = False,
    ) -> None:  # fmt: skip
        """out[active] += low · up + lora_bias_scale · lora_bias; low `[M, R]`, up `[R, N]`."""
        act, (rank, n) = self.call.activation, up.shape
        if act.max_active == 0 or n == 0:
            return
        on, seed, threshold = self._drop(dropout)
        plan = planning.expand_add(
            low.dtype, act.max_active, n, rank, operand(up), operand(out), up.dtype != low.dtype,
            on,
        )  # fmt: skip
        self.send(plan, (
            low, up, dense(lora_bias), out, act.active_rows, act.active_count, seed, low.stride(0),
            *up.stride(), *out.stride(), n, rank, lora_bias_scale, threshold, plan.flags, 0,
        ))  # fmt: skip

    def grad(self, wide: Tensor, low: Tensor, out: Tensor, dropout: bool) -> None:
        """out = Σ_active wideᵀ · low; wide `[M, P]`, low `[M, ≥ R]`, out `[P, R]`."""
        act, (p, rank) = self.call.activation, out.shape
        if p == 0:
            return
        on, seed, threshold = self._drop(dropout)
        part_plan, plan = plan_grads.grad(
            wide.dtype, act.max_active, p, rank, operand(wide), on, out.dtype == torch.float32,
            self.multiprocessors,
        )  # fmt: skip
        part = torch.empty(part_plan.workspace, dtype=torch.float32, device=wide.device)
        r16, rows = part_plan.workspace[2], part_plan.split
        if act.max_active > 0:
            self.send(part_plan, (
                wide, low, part, act.active_rows, act.active_count, seed, *wide.stride(),
                low.stride(0), p, r16, rows, threshold, part_plan.flags, 0,
            ))  # fmt: skip
        self.send(plan, (
            part, out, None, act.active_count, *out.stride(), p, rank, r16, rows, 0, 1.0,
            plan.flags, 0,
        ))  # fmt: skip

    def grad_b(
        self, dy: Tensor, xa: Tensor, lora_b: Tensor, dya: Tensor, scale: float
    ) -> Tensor | None:
        """dB `[N, R]` = Σ_active dyᵀ · xa and dya[active] = scale · dy · lora_b, dy read once.

        None, and nothing is done, where two passes move fewer bytes. dy `[M, N]`, lora_b `[N, R]`,
        xa and dya `[M, ≥ R16]`: dya's padding columns become zero.
        """
        act, (n, rank) = self.call.activation, lora_b.shape
        adapter_float = lora_b.dtype != dy.dtype
        plans = plan_grads.grad_b(
            dy.dtype, act.max_active, n, rank, operand(dy), adapter_float, self.multiprocessors
        )
        if plans is None:
            return None
        both, sum_b, sum_low = plans
        (parts, splits, _), rows, r16 = both.grid, both.split, both.workspace[1]
        work = torch.empty(both.workspace, dtype=torch.float32, device=dy.device)
        part, low_part = work[: splits * n], work[splits * n :]
        self.send(both, (
            dy, xa, lora_b, part, low_part, act.active_rows, act.active_count, dy.stride(0),
            xa.stride(0), *lora_b.stride(), n, rank, r16, rows, act.max_active, both.flags,
        ))  # fmt: skip
        out = torch.empty(lora_b.shape, dtype=lora_b.dtype, device=dy.device)
        self.send(sum_b, (
            part, out, None, act.active_count, *out.stride(), n, rank, r16, rows, 0, 1.0,
            sum_b.flags, 0,
        ))  # fmt: skip
        self.send(sum_low, (
            low_part, dya, act.active_rows, act.active_count, *dya.stride(), act.max_active, r16,
            r16, 0, parts, scale, sum_low.flags, 0,
        ))  # fmt: skip
        return out
