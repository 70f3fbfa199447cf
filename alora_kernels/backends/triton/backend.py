"""`TritonBackend`: the strategies `delta` and `tail` composed from the kernels."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import Call, Gradients, Needs, Problem, Projection, saved_columns, saved_dtype


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _driver_target() -> Any:
    from triton.runtime import driver

    try:
        return driver.active.get_current_target()
    except Exception:  # no driver at all: triton raises what its plugins happen to raise
        return None


class TritonBackend:
    name = "triton"

    def why_not_here(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if interpreting():
            return None
        target = _driver_target()
        if target is None or target.backend != "cuda":
            return "no NVIDIA GPU is visible to triton"
        return None if target.arch >= 80 else f"sm_{target.arch} is older than sm_80"

    def accepts_device(self, device_type: str) -> bool:
        """Whether tensors of this device type can be handed to the kernels."""
        if device_type == "cpu":
            if interpreting():
                return True
            from triton.runtime import driver

            return driver.active.get_active_torch_device().type == "cpu"
        return device_type == "cuda" and not interpreting()

    def why_not(self, problem: Problem, strategy: str) -> str | None:
        here = self.why_not_here()
        if here is not None:
            return here
        if not self.accepts_device(problem.device):
            return f"the tensors are on {problem.device}"
        if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{problem.dtype} has no Triton kernel"
        if strategy == "onepass":
            return "the strategy 'onepass' has no Triton kernel yet"
        if strategy == "tail" and problem.base_given:
            return "the base output is given: only 'delta' adds to it"
        if strategy == "tail" and problem.adapter_precision == "fp32":
            return "adapter_precision='fp32' needs 'delta'"
        if strategy == "tail" and problem.strict_inactive:
            return "strict_inactive needs 'delta'"
        if max(problem.ranks) > 256:
            return f"rank {max(problem.ranks)} is above 256"
        return None

    def forward(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        base_outs: Sequence[Tensor] | None, save: bool,
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        from . import launch

        xa = _low(call, x, projections, [p.lora_a for p in projections], [x], True)
        begins, _ = saved_columns([p.lora_a.shape[0] for p in projections], "cuda")
        outs = []
        for i, p in enumerate(projections):
            low, right, scaling = xa[:, begins[i] :], p.lora_b.t(), call.scalings[i]
            if strategy == "tail" and base_outs is None:
                assert p.weight is not None
                y = x.new_empty(x.shape[0], p.weight.shape[0])
                launch.gemm(
                    call, _arch(), x, p.weight.t(), y, bias=p.bias, low=low, tail=right,
                    lora_bias=p.lora_bias, scaling=scaling,
                )  # fmt: skip
            else:
                y = F.linear(x, p.weight, p.bias) if base_outs is None else base_outs[i]  # type: ignore[arg-type]
                launch.expand_add(call, low, right, y, p.lora_bias, scaling)
            outs.append(y)
        return outs, xa if save else None

    def backward(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        xa: Tensor | None, dys: Sequence[Tensor], needs: Needs,
    ) -> Gradients:  # fmt: skip
        from . import launch

        ranks = [p.lora_a.shape[0] for p in projections]
        begins, _ = saved_columns(ranks, "cuda")
        dya = None
        if needs.x or any(needs.lora_a):
            dya = _low(call, x, projections, [p.lora_b.t() for p in projections], dys, False)
        dx = self._dx(call, strategy, x, projections, dya, dys) if needs.x else None
        grads: tuple[list[Tensor | None], ...] = ([], [], [])
        for i, (p, dy) in enumerate(zip(projections, dys)):
            da = db = dbias = None
            if needs.lora_a[i]:
                assert dya is not None
                wide, _ = launch.grad(call, x, dya[:, begins[i] :], ranks[i], True, False)
                da = wide.t().contiguous().to(p.lora_a.dtype)
            wants_bias = needs.lora_bias[i] and p.lora_bias is not None
            if needs.lora_b[i] or wants_bias:
                assert xa is not None
                low = xa[:, begins[i] :]
                wide, sums = launch.grad(call, dy, low, ranks[i], False, wants_bias)
                db = wide.to(p.lora_b.dtype) if needs.lora_b[i] else None
                if sums is not None and p.lora_bias is not None:
                    dbias = (sums * call.scalings[i]).to(p.lora_bias.dtype)
            for column, value in zip(grads, (da, db, dbias)):
                column.append(value)
        return Gradients(dx, *grads)

    def _dx(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        dya: Tensor | None, dys: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        from . import launch

        assert dya is not None
        begins, _ = saved_columns([p.lora_a.shape[0] for p in projections], "cuda")
        dx = x.new_zeros(x.shape) if projections[0].weight is None else x.new_empty(x.shape)
        for i, (p, dy) in enumerate(zip(projections, dys)):
            low, prefix = dya[:, begins[i] :], not call.prefix_grad
            fused = strategy == "tail" and p.weight is not None
            if p.weight is not None and (fused or prefix):
                launch.gemm(
                    call, _arch(), dy, p.weight, dx, low=low if fused else None,
                    tail=p.lora_a if fused else None, dropout=fused, add=i > 0, active_only=prefix,
                )  # fmt: skip
            elif p.weight is not None:
                dx = dy @ p.weight if i == 0 else dx.addmm_(dy, p.weight)
            if not fused:
                launch.expand_add(call, low, p.lora_a, dx, None, 1.0, dropout=True)
        return dx


def _low(
    call: Call, x: Tensor, projections: Sequence[Projection], rights: Sequence[Tensor],
    lefts: Sequence[Tensor], dropout: bool,
) -> Tensor:  # fmt: skip
    """xa (one shared left: one shrink for the group) or dya (a left for each projection)."""
    from . import launch

    begins, total = saved_columns([p.lora_a.shape[0] for p in projections], "cuda")
    dtype = saved_dtype(x.dtype, call.adapter_precision)
    low = torch.empty(x.shape[0], total, dtype=dtype, device=x.device)
    scales = [s / (1.0 - call.dropout_p) for s in call.scalings]
    if len(projections) > 1 and dropout:
        stacked = torch.zeros(total, x.shape[1], dtype=dtype, device=x.device)
        scale = torch.zeros(total, dtype=torch.float32, device=x.device)
        for begin, right, s in zip(begins, rights, scales):
            stacked[begin : begin + right.shape[0]].copy_(right)
            scale[begin : begin + right.shape[0]].fill_(s)
        launch.shrink(call, lefts[0], stacked, low, scale, True)
        return low
    for i, right in enumerate(rights):
        launch.shrink(call, lefts[i], right, low[:, begins[i] :], scales[i], dropout)
    return low


def _arch() -> int:
    target = None if interpreting() else _driver_target()
    return 0 if target is None else int(target.arch)
