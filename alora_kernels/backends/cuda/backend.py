"""`CudaBackend`: the strategies `delta`, `tail` and `onepass` composed from the kernels."""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...contract import Call, Gradients, Needs, Problem, Projection, saved_columns
from ...cost import Schedule, rates_of
from .launch import Column, Launcher, Send, send_to_gpu
from .plan import MAX_ONEPASS_RANK, MAX_RANK, NAMES, Plan
from .replay import Replays, layouts
from .schedule import schedules

BUILD_FILE = Path(__file__).resolve().parents[2] / "_cuda_build.json"


@functools.cache
def build_report() -> dict[str, Any]:
    """What the build wrote down: nvcc's version, the archs, and ptxas's figures of each kernel."""
    return json.loads(BUILD_FILE.read_text()) if BUILD_FILE.exists() else {}


@functools.cache
def _why_not_here() -> str | None:
    try:
        from ... import _cuda
    except ImportError as error:
        if BUILD_FILE.exists():
            return f"the extension alora_kernels._cuda does not load: {error}"
        return "the extension alora_kernels._cuda is not built: install where nvcc is found"
    driver, runtime = _cuda.versions()
    if driver == 0:
        return "no NVIDIA driver is installed"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver supports CUDA {_version(driver)}, the kernels were built with "
            f"{_version(runtime)}: update the driver, or build with an older nvcc"
        )
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible to torch"
    return why_no_kernel(*torch.cuda.get_device_capability(), build_report().get("archs", []))


def why_no_kernel(major: int, minor: int, archs: Sequence[str]) -> str | None:
    """Why none of the built `archs` (`"sm_80"`, `"sm_90a"`, `"compute_80"`) runs on a GPU.

    Binaries run on the same major version from their minor version on, those with a suffix on
    exactly theirs; PTX runs on everything not older.
    """
    here = 10 * major + minor
    for arch in archs:
        kind, _, name = arch.partition("_")
        number = int(name.rstrip("af"))
        if kind == "compute" and name.isdigit() and number <= here:
            return None
        exact = not name.isdigit()
        if kind == "sm" and (number == here if exact else number // 10 == major and number <= here):
            return None
    return f"no kernel was built for sm_{here} (built: {', '.join(archs) or 'none'})"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _hopper() -> bool:
    """Whether Hopper's own kernels were built."""
    return "sm_90a" in build_report().get("archs", [])


@functools.cache
def _machine(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, arch)"""
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    if arch == 90 and not _hopper():
        arch = 80
    return properties.multi_processor_count, arch


class CudaBackend:
    """`send` and `machine` are for tests, which execute the plans without a GPU."""

    name = "cuda"

    def __init__(self, send: Send = send_to_gpu, machine: tuple[int, int] | None = None) -> None:
        self._send = send
        self._fixed_machine = machine
        self._replays = Replays()

    def why_not_here(self) -> str | None:
        return None if self._send is not send_to_gpu else _why_not_here()

    def why_not(self, problem: Problem, strategy: str) -> str | None:
        here = self.why_not_here()
        if here is not None:
            return here
        if problem.device != "cuda" and self._send is send_to_gpu:
            return f"the tensors are on {problem.device}"
        if problem.dtype not in NAMES:
            return f"{problem.dtype} has no CUDA kernel: bfloat16 and float16 have"
        if problem.adapter_dtype not in (problem.dtype, torch.float32):
            return f"adapters in {problem.adapter_dtype} over {problem.dtype} have no CUDA kernel"
        if problem.adapter_precision == "fp32":
            return "adapter_precision='fp32' has no CUDA kernel"
        rank = max(problem.ranks)
        if rank > MAX_RANK:
            return f"rank {rank} is above {MAX_RANK}"
        if strategy == "delta":
            return None
        if problem.base_given:
            return "the base output is given: only 'delta' adds to it"
        if problem.strict_inactive:
            return "strict_inactive needs 'delta'"
        if strategy == "onepass" and rank > MAX_ONEPASS_RANK:
            return f"rank {rank} is above {MAX_ONEPASS_RANK}, the most that 'onepass' takes"
        if strategy == "onepass" and problem.dropout:
            return "with dropout the adapter reads another x than the base: use 'tail' or 'delta'"
        return None

    def schedules(self, problem: Problem, strategy: str) -> tuple[Schedule, ...]:
        """What the cost model asks for: the GEMM of each projection."""
        arch = 80 if problem.arch == 90 and not _hopper() else problem.arch
        return schedules(problem, strategy, self._fixed_machine or (rates_of(arch).sms, arch))

    def forward(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        base_outs: Sequence[Tensor] | None, save: bool,
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        if self._send is not send_to_gpu:
            return self._forward(self._send, call, strategy, x, projections, base_outs, save)
        inputs = _inputs(x, projections)
        if base_outs is not None:
            inputs += base_outs

        def run(send: Send) -> list[Tensor | None]:
            outs, xa = self._forward(send, call, strategy, x, projections, base_outs, save)
            return [*outs, xa]

        if call.memory is not None and base_outs is None:
            key: Hashable = (call.memory, strategy, save)
        else:
            key = (_facts(call), strategy, save, base_outs is None, layouts(inputs))
        *outs, xa = self._replays.run(key, [*inputs, *_plain(call)], run)
        return outs, xa  # type: ignore[return-value]

    def backward(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        xa: Tensor | None, dys: Sequence[Tensor], needs: Needs,
    ) -> Gradients:  # fmt: skip
        if self._send is not send_to_gpu:
            return self._backward(self._send, call, strategy, x, projections, xa, dys, needs)
        count = len(projections)
        inputs = _inputs(x, projections)
        inputs += (xa, *dys)

        def run(send: Send) -> list[Tensor | None]:
            grads = self._backward(send, call, strategy, x, projections, xa, dys, needs)
            return [grads.x, *grads.lora_a, *grads.lora_b, *grads.lora_bias]

        # (Hooks of autograd may have laid out saved tensors anew: `known` is of forward's.)
        key = (_facts(call), strategy, needs, layouts(inputs))
        dx, *rest = self._replays.run(key, [*inputs, *_plain(call)], run)
        return Gradients(dx, rest[:count], rest[count : 2 * count], rest[2 * count :])

    def _launcher(self, send: Send, call: Call, x: Tensor) -> Launcher:
        return Launcher(send, call, *(self._fixed_machine or _machine(x.device)))

    def _forward(
        self, send: Send, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        base_outs: Sequence[Tensor] | None, save: bool,
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        launch = self._launcher(send, call, x)
        begins, total = saved_columns([p.lora_a.shape[0] for p in projections])
        if strategy == "tail" and base_outs is None and len(projections) == 1:
            done = _fused_forward(launch, x, projections[0], total)
            if done is not None:
                return [done[0]], done[1] if save else None
        onepass = strategy == "onepass" and base_outs is None
        xa = _low(launch, strategy, x, total) if save or not onepass else None
        if not onepass:
            assert xa is not None
            scales = [s / (1.0 - call.options.dropout_p) for s in call.scalings]
            _shrink_group(launch, x, [p.lora_a for p in projections], scales, xa)
        outs = []
        for i, p in enumerate(projections):
            low = None if xa is None else xa[:, begins[i] :]
            up, scaling = p.lora_b.t(), call.scalings[i]
            if base_outs is None and strategy != "delta":
                assert p.weight is not None
                y = x.new_empty(x.shape[0], p.weight.shape[0])
                if (
                    onepass
                    and not save
                    and launch.decode(x, p.weight, y, p.bias, up, p.lora_a, p.lora_bias, scaling)
                ):
                    outs.append(y)
                    continue
                launch.gemm(
                    x, p.weight.t(), y, bias=p.bias, low=low, up=up,
                    down=p.lora_a if onepass else None, scale=scaling, lora_bias=p.lora_bias,
                    lora_bias_scale=scaling,
                )  # fmt: skip
            else:
                y = base_outs[i] if base_outs else launch.vendor(F.linear, x, p.weight, p.bias)
                assert low is not None
                launch.expand_add(low, up, y, p.lora_bias, scaling)
            outs.append(y)
        return outs, xa if save else None

    def _backward(
        self, send: Send, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        xa: Tensor | None, dys: Sequence[Tensor], needs: Needs,
    ) -> Gradients:  # fmt: skip
        launch = self._launcher(send, call, x)
        begins, total = saved_columns([p.lora_a.shape[0] for p in projections])
        # onepass makes dya on the way to dx; a layer whose x needs no gradient has no such way.
        onepass = strategy == "onepass" and needs.x and projections[0].weight is not None
        dya = None
        fused: list[Plan | None] = [None] * len(projections)
        if strategy == "tail" and needs.x:
            fused = [
                launch.plan_fused(
                    dy, p.weight, p.lora_a, p.lora_b.t(), total, i > 0, not call.options.prefix_grad
                )
                for i, (p, dy) in enumerate(zip(projections, dys))
            ]
        if needs.x or any(needs.lora_a):
            dya = _low(launch, strategy, x, total, None in fused)
        dbs: list[Tensor | None] = [None] * len(projections)
        if dya is not None and not onepass:
            for i, (p, dy) in enumerate(zip(projections, dys)):
                if fused[i] is not None:
                    continue
                scale = call.scalings[i] / (1.0 - call.options.dropout_p)
                if needs.lora_b[i]:
                    assert xa is not None
                    low, out = xa[:, begins[i] :], dya[:, begins[i] :]
                    dbs[i] = launch.grad_b(dy, low, p.lora_b, out, scale)
                    if dbs[i] is not None:
                        continue
                right = p.lora_b.t()
                columns = [(right, r, scale) for r in range(0, right.shape[0], 16)]
                launch.shrink(dy, columns, dya[:, begins[i] :], dropout=False)
        dx = None
        if needs.x:
            assert dya is not None
            dx = self._dx(launch, strategy, x, projections, dya, dys, onepass, fused)
        grads: tuple[list[Tensor | None], ...] = ([], [], [])
        for i, (p, dy) in enumerate(zip(projections, dys)):
            da, db, dbias = None, dbs[i], None
            if needs.lora_a[i]:
                assert dya is not None
                da = torch.empty(p.lora_a.shape, dtype=p.lora_a.dtype, device=x.device)
                launch.grad(x, dya[:, begins[i] :], da.t(), dropout=True)
            if needs.lora_b[i] and db is None:
                assert xa is not None
                db = torch.empty(p.lora_b.shape, dtype=p.lora_b.dtype, device=x.device)
                launch.grad(dy, xa[:, begins[i] :], db, dropout=False)
            if needs.lora_bias[i] and p.lora_bias is not None:
                active = call.activation.mask.unsqueeze(1)
                sums = torch.where(active, dy, 0).sum(0, dtype=torch.float32)
                dbias = (sums * call.scalings[i]).to(p.lora_bias.dtype)
            for column, value in zip(grads, (da, db, dbias)):
                column.append(value)
        return Gradients(dx, *grads)

    def _dx(
        self, launch: Launcher, strategy: str, x: Tensor, projections: Sequence[Projection],
        dya: Tensor, dys: Sequence[Tensor], onepass: bool, persistent: Sequence[Plan | None],
    ) -> Tensor:  # fmt: skip
        begins, _ = saved_columns([p.lora_a.shape[0] for p in projections])
        prefix = not launch.call.options.prefix_grad
        dx = x.new_zeros(x.shape) if projections[0].weight is None else x.new_empty(x.shape)
        for i, (p, dy) in enumerate(zip(projections, dys)):
            low = dya[:, begins[i] :]
            plan = persistent[i]
            if plan is not None:
                assert p.weight is not None
                launch.fused(
                    plan, dy, p.weight, dx, bias=None, low=low, up=p.lora_a, down=p.lora_b.t(),
                    scale=launch.call.scalings[i],
                )  # fmt: skip
                continue
            fused = strategy != "delta" and p.weight is not None
            if p.weight is not None and (fused or prefix):
                launch.gemm(
                    dy, p.weight, dx, low=low if fused else None,
                    up=p.lora_a if fused else None, down=p.lora_b.t() if onepass else None,
                    scale=launch.call.scalings[i], dropout=fused, add=i > 0, active_only=prefix,
                )  # fmt: skip
            elif p.weight is not None:
                if i == 0:
                    dx = launch.vendor(torch.mm, dy, p.weight)
                else:
                    launch.vendor(Tensor.addmm_, dx, dy, p.weight)
            if not fused:
                launch.expand_add(low, p.lora_a, dx, None, 1.0, dropout=True)
        return dx


def _facts(call: Call) -> tuple[Any, ...]:
    """All of a call and its activation that is no tensor and that kernels depend on."""
    return (call[1:3], call[4:7], call.activation.max_active)


def _inputs(x: Tensor, projections: Sequence[Projection]) -> list[Tensor | None]:
    """The tensors of a call whose layout matters."""
    inputs: list[Tensor | None] = [x]
    for p in projections:
        inputs += p
    return inputs


def _plain(call: Call) -> list[Tensor | None]:
    """The tensors of a call that have one layout."""
    act = call.activation
    return [act.row_adapter, act.active_rows, act.active_count, call.seed]


def _low(launch: Launcher, strategy: str, x: Tensor, columns: int, given: bool = True) -> Tensor:
    """Memory for xa or dya. Tensor maps read whole tiles of it, so inactive rows must be zero.

    Not `given`: the kernel that reads it also writes it, inactive rows included.
    """
    zero = launch.arch == 90 and strategy == "tail" and given
    return (x.new_zeros if zero else x.new_empty)(x.shape[0], columns)


def _fused_forward(
    launch: Launcher, x: Tensor, p: Projection, columns: int
) -> tuple[Tensor, Tensor] | None:
    """(y, xa) by one launch, where there is one."""
    up, scaling = p.lora_b.t(), launch.call.scalings[0]
    weight = None if p.weight is None else p.weight.t()
    plan = launch.plan_fused(x, weight, up, p.lora_a, columns)
    if plan is None or weight is None:
        return None
    xa, y = x.new_empty(x.shape[0], columns), x.new_empty(x.shape[0], weight.shape[1])
    launch.fused(
        plan, x, weight, y, bias=p.bias, low=xa, up=up, down=p.lora_a, scale=scaling,
        lora_bias=p.lora_bias, lora_bias_scale=scaling,
    )  # fmt: skip
    return y, xa


def _shrink_group(
    launch: Launcher, x: Tensor, lora_as: Sequence[Tensor], scales: Sequence[float], xa: Tensor
) -> None:
    """xa of all projections: one launch where their adapters are laid out alike."""
    begins, _ = saved_columns([a.shape[0] for a in lora_as])
    alike = all(a.stride() == lora_as[0].stride() and a.dtype == lora_as[0].dtype for a in lora_as)
    columns: list[Column] = []
    for a, begin, scale in zip(lora_as, begins, scales):
        own = [(a, r, scale) for r in range(0, a.shape[0], 16)]
        if alike:
            columns += own
        else:
            launch.shrink(x, own, xa[:, begin:], dropout=True)
    if columns:
        launch.shrink(x, columns, xa, dropout=True)
