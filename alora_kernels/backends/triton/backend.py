"""`TritonBackend`: the strategies `delta`, `tail` and `onepass` composed from the kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from ...contract import (
    Call,
    Gradients,
    Needs,
    Problem,
    Projection,
    Schedule,
    saved_columns,
    saved_dtype,
)
from . import target
from .configs import MAX_ONEPASS_RANK, MAX_RANK, both_in_one_pass
from .schedule import schedules

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TritonBackend:
    name = "triton"

    def why_not_here(self) -> str | None:
        if not target.installed():
            return "triton is not installed"
        if target.interpreting():
            return None
        found = target.target()
        if found is None or found.backend != "cuda":
            return "no NVIDIA GPU is visible to triton"
        return None if found.arch >= 80 else f"sm_{found.arch} is older than sm_80"

    def accepts_device(self, device_type: str) -> bool:
        """Whether tensors of this device type can be handed to the kernels."""
        if device_type == "cpu":
            if target.interpreting():
                return True
            from triton.runtime import driver

            return driver.active.get_active_torch_device().type == "cpu"
        return device_type == "cuda" and not target.interpreting()

    def why_not(self, problem: Problem, strategy: str) -> str | None:
        here = self.why_not_here()
        if here is not None:
            return here
        if not self.accepts_device(problem.device):
            return f"the tensors are on {problem.device}"
        if problem.dtype not in DTYPES:
            return f"{problem.dtype} has no Triton kernel"
        if problem.adapter_dtype not in DTYPES:
            return f"an adapter in {problem.adapter_dtype} has no Triton kernel"
        rank = max(problem.ranks)
        if rank > MAX_RANK:
            return f"rank {rank} is above {MAX_RANK}"
        if strategy == "delta":
            return None
        if problem.base_given:
            return "the base output is given: only 'delta' adds to it"
        if problem.adapter_precision == "fp32":
            return "adapter_precision='fp32' needs 'delta'"
        if problem.strict_inactive:
            return "strict_inactive needs 'delta'"
        if strategy == "onepass":
            if problem.dropout and not problem.backward:
                return "with dropout the base and the adapter read different inputs: no 'onepass'"
            if rank > MAX_ONEPASS_RANK:
                return (
                    f"rank {rank} is above the {MAX_ONEPASS_RANK} columns that 'onepass' can hold"
                )
        return None

    def schedules(self, problem: Problem, strategy: str) -> tuple[Schedule, ...]:
        """What the cost model asks for: the GEMM of each projection."""
        return schedules(problem, strategy)

    def forward(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        base_outs: Sequence[Tensor] | None, save: bool,
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        projections = [_packed(p) for p in projections]
        with _on_device(x):
            if strategy == "onepass":
                return _forward_onepass(call, x, projections, save)
            return _forward(call, strategy, x, projections, base_outs, save)

    def backward(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        xa: Tensor | None, dys: Sequence[Tensor], needs: Needs,
    ) -> Gradients:  # fmt: skip
        with _on_device(x):
            return _backward(call, strategy, x, projections, xa, dys, needs)


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of `x`."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _packed(p: Projection) -> Projection:
    """`p` with biases that the kernels can read without a stride; no copy in the usual case."""
    if (p.bias is None or p.bias.is_contiguous()) and (
        p.lora_bias is None or p.lora_bias.is_contiguous()
    ):
        return p
    return p._replace(
        bias=None if p.bias is None else p.bias.contiguous(),
        lora_bias=None if p.lora_bias is None else p.lora_bias.contiguous(),
    )


def _layout(projections: Sequence[Projection]) -> tuple[list[slice], tuple[int, ...], int]:
    """The columns of each projection in xa, where they begin, and how many xa has with padding."""
    ranks = [p.lora_a.shape[0] for p in projections]
    begins, total = saved_columns(ranks)
    return [slice(b, b + r) for b, r in zip(begins, ranks)], begins, total


def _forward(
    call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
    base_outs: Sequence[Tensor] | None, save: bool,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    """`delta`, and `tail` as far as the base is computed here."""
    from . import launch

    columns, begins, total = _layout(projections)
    # Only backward and tail look xa up by row.
    compact = strategy == "delta" and not save
    xa = torch.empty(
        call.activation.max_active if compact else x.shape[0], total,
        dtype=saved_dtype(x.dtype, call.options.adapter_precision), device=x.device,
    )  # fmt: skip
    launch.shrink(
        call, x, [p.lora_a for p in projections],
        [s / (1.0 - call.options.dropout_p) for s in call.scalings], begins, xa, dropout=True,
        compact=compact,
    )  # fmt: skip
    outs = []
    for i, p in enumerate(projections):
        low, up, scaling = xa[:, columns[i]], p.lora_b.t(), call.scalings[i]
        if strategy == "tail" and base_outs is None:
            assert p.weight is not None
            y = x.new_empty(x.shape[0], p.weight.shape[0])
            adapter = call.activation.max_active > 0
            launch.gemm(
                call, x, p.weight.t(), y, bias=p.bias, low=low if adapter else None,
                up=up if adapter else None, lora_bias=p.lora_bias, scaling=scaling,
            )  # fmt: skip
        else:
            y = F.linear(x, p.weight, p.bias) if base_outs is None else base_outs[i]  # type: ignore[arg-type]
            launch.expand_add(call, low, up, y, p.lora_bias, scaling, compact=compact)
        outs.append(y)
    return outs, xa if save else None


def _forward_onepass(
    call: Call, x: Tensor, projections: Sequence[Projection], save: bool
) -> tuple[list[Tensor], Tensor | None]:
    from . import launch

    columns, _, total = _layout(projections)
    xa = x.new_empty(x.shape[0], total) if save else None
    outs = []
    for i, p in enumerate(projections):
        assert p.weight is not None
        y = x.new_empty(x.shape[0], p.weight.shape[0])
        launch.gemm(
            call, x, p.weight.t(), y, bias=p.bias, down=p.lora_a.t(),
            low=None if xa is None else xa[:, columns[i]], up=p.lora_b.t(), lora_bias=p.lora_bias,
            scaling=call.scalings[i],
        )  # fmt: skip
        outs.append(y)
    return outs, xa


def _backward(
    call: Call, strategy: str, x: Tensor, projections: Sequence[Projection], xa: Tensor | None,
    dys: Sequence[Tensor], needs: Needs,
) -> Gradients:  # fmt: skip
    from . import launch

    columns, _, total = _layout(projections)
    dtype = saved_dtype(x.dtype, call.options.adapter_precision)
    dya = None
    if needs.x or any(needs.lora_a):
        dya = torch.empty(x.shape[0], total, dtype=dtype, device=x.device)
    grads: tuple[list[Tensor | None], ...] = ([], [], [])
    dx = x.new_empty(x.shape) if needs.x else None
    for i, (p, dy) in enumerate(zip(projections, dys)):
        scaling = call.scalings[i]
        scale = scaling / (1.0 - call.options.dropout_p)
        low = None if dya is None or not (needs.x or needs.lora_a[i]) else dya[:, columns[i]]
        wants_bias = needs.lora_bias[i] and p.lora_bias is not None
        da = p.lora_a.new_empty(p.lora_a.shape) if needs.lora_a[i] else None
        db = p.lora_b.new_empty(p.lora_b.shape) if needs.lora_b[i] or wants_bias else None
        dbias = p.lora_b.new_empty(p.lora_b.shape[0]) if wants_bias else None
        onepass = strategy == "onepass" and dx is not None and p.weight is not None
        both = both_in_one_pass(p.lora_b.shape[0], p.lora_b.shape[1], dtype) and not onepass
        if db is not None:
            assert xa is not None
            if low is not None and both:
                launch.grad_b(
                    call, dy, xa[:, columns[i]], p.lora_b, low, db, scale=scale, sums=dbias,
                    scaling=scaling,
                )  # fmt: skip
            else:
                launch.grad(call, dy, xa[:, columns[i]], db, sums=dbias, scaling=scaling)
        if low is not None and not onepass and not (both and db is not None):
            launch.shrink(call, dy, [p.lora_b.t()], [scale], [0], low, dropout=False)
        if dx is not None:
            assert low is not None
            _dx(call, strategy, p, dy, low, dx, add=i > 0, scale=scale)
        if da is not None:
            assert low is not None
            launch.grad(call, x, low, da, transposed=True, dropout=True)
        for column, value in zip(grads, (da, db if needs.lora_b[i] else None, dbias)):
            column.append(value)
    return Gradients(dx, *grads)


def _dx(
    call: Call, strategy: str, p: Projection, dy: Tensor, dya: Tensor, dx: Tensor, *, add: bool,
    scale: float,
) -> None:  # fmt: skip
    """dx (+)= dy · weight + keep ⊙ (dya · lora_a); `onepass` computes dya and stores it."""
    from . import launch

    prefix = not call.options.prefix_grad
    if p.weight is None:
        if not add:
            dx.zero_()
        launch.expand_add(call, dya, p.lora_a, dx, None, 1.0, dropout=True)
        return
    if strategy == "onepass":
        launch.gemm(
            call, dy, p.weight, dx, down=p.lora_b, low=dya, up=p.lora_a, scaling=scale,
            dropout=True, add=add, active_only=prefix,
        )  # fmt: skip
        return
    # Tiles without an active row store zeros: then fusing is safe for any lora_a.
    fused = (strategy == "tail" or prefix) and dya.dtype == dx.dtype
    if fused or prefix:
        adapter = fused and call.activation.max_active > 0
        launch.gemm(
            call, dy, p.weight, dx, low=dya if adapter else None, up=p.lora_a if adapter else None,
            dropout=adapter, add=add, active_only=prefix,
        )  # fmt: skip
    elif add:
        dx.addmm_(dy, p.weight)
    else:
        torch.mm(dy, p.weight, out=dx)
    if not fused:
        launch.expand_add(call, dya, p.lora_a, dx, None, 1.0, dropout=True)
