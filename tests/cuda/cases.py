"""One case: forward and backward of the backend, kernels executed, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alora_kernels.activation import Activation
from alora_kernels.backends.cuda import CudaBackend
from alora_kernels.contract import DEFAULTS, Backend, Call, Needs, Projection
from alora_kernels.reference import alora_linear_reference

from ..oracle import Change, assert_error, errors_of_pytorch
from .ptx_sender import CSRC, PtxSender


@dataclass(frozen=True)
class Case:
    strategy: str
    dtype: torch.dtype = torch.bfloat16
    adapter: str = "same"  # or "fp32"
    m: int = 40
    k: int = 72
    n: int = 136
    r: int = 24
    active: str = "some"  # none, one, some, half_tile, all
    layout: str = "plain"  # strided, offset, weight_t: see `_laid_out`
    dropout: float = 0.0
    prefix_grad: bool = True
    bias: str = "base"  # none, base, both
    count: int = 1  # projections
    known: bool = True  # the host knows the number of active rows
    add: bool = False  # alora_add: the base output is given
    reverse: bool = False  # order in which the blocks run
    machine: int = 8  # multiprocessors to plan for: few make large tiles
    arch: str = "sm_80"
    order: str = "lockstep"  # of warps, where blocks wait for each other


def mask_of(case: Case) -> Tensor:
    m = case.m
    return {
        "none": lambda: torch.zeros(m, dtype=torch.bool),
        "one": lambda: torch.arange(m) == m // 2,
        "some": lambda: torch.rand(m) < 0.3,
        "half_tile": lambda: torch.arange(m) >= m - m // 2,
        "all": lambda: torch.ones(m, dtype=torch.bool),
    }[case.active]()


def _laid_out(case: Case, values: Tensor, weight: bool = False) -> Tensor:
    """The same values in another layout of memory."""
    rows, columns = values.shape
    if case.layout == "weight_t":
        return values.t().contiguous().t() if weight else values
    if case.layout == "offset":  # aligned rows from an odd address
        wide = values.new_full((rows * (columns + 8) + 1,), torch.nan)
        view = wide[1:].view(rows, columns + 8)[:, :columns]
        return view.copy_(values)
    if case.layout == "strided" and not weight:  # every second element of longer rows
        wide = values.new_full((rows, 2 * columns), torch.nan)
        return wide[:, ::2].copy_(values)
    return values


def _strided_vector(values: Tensor) -> Tensor:
    return torch.stack([values, torch.full_like(values, torch.nan)], 1)[:, 0]


class Inputs(NamedTuple):
    """What the backend is asked with."""

    mask: Tensor
    call: Call
    x: Tensor
    projections: list[Projection]
    dys: list[Tensor]

    @property
    def needs(self) -> Needs:
        return Needs(True, *([(True,) * len(self.projections)] * 3))


def inputs(case: Case, seed: int) -> Inputs:
    m, k, n, r = case.m, case.k, case.n, case.r
    dtype, adapter = case.dtype, torch.float32 if case.adapter == "fp32" else case.dtype
    mask = mask_of(case)
    act = Activation.from_mask(mask)
    if not case.known:
        act = Activation(act.row_adapter, act.active_rows, act.active_count)
    values = torch.randn(m, k).to(dtype)
    values[~mask, :1] = torch.nan if case.add else 3.0  # the adapter never reads inactive rows
    x = _laid_out(case, values)
    projections = [
        Projection(
            _laid_out(case, (torch.randn(n, k) / k**0.5).to(dtype), weight=True),
            _strided_vector(torch.randn(n).to(dtype)) if case.bias != "none" else None,
            (torch.randn(r, k) / k**0.5).to(adapter),
            (torch.randn(n, r) / r**0.5).to(adapter),
            _strided_vector(torch.randn(n).to(adapter)) if case.bias == "both" else None,
        )
        for _ in range(case.count)
    ]
    dys = [_laid_out(case, torch.randn(m, n).to(dtype)) for _ in projections]
    scalings = tuple(1.5 - 0.5 * i for i in range(case.count))
    key = torch.tensor([seed - 2**40])
    options = DEFAULTS._replace(dropout_p=case.dropout, prefix_grad=case.prefix_grad)
    call = Call(act, scalings, options, key if case.dropout else None)
    return Inputs(mask, call, x, projections, dys)


def run(
    case: Case, seed: int, backward: bool = True, csrc: Path = CSRC, gpu: bool = False,
    other: Backend | None = None, make_sender: Callable[..., PtxSender] = PtxSender,
) -> PtxSender:  # fmt: skip
    """Fails unless every result is at most twice as far from the truth as PyTorch's own.

    Without `backward` only the outputs are made, as for inference. With `gpu` the kernels are
    launched; the caller makes the GPU torch's default device. `other` is asked instead of the CUDA
    backend.
    """
    dtype, m, n = case.dtype, case.m, case.n
    asked = inputs(case, seed)
    mask, call, x, projections, dys = asked

    def expected(dt: torch.dtype, change: Change = lambda t: t) -> list[Tensor | None]:
        leaf = change(x).to(dt).detach().requires_grad_()
        outs, leaves = [], [leaf]
        for p, scaling in zip(projections, call.scalings):
            own = [
                change(t).to(dtype).to(dt).requires_grad_()
                for t in (p.lora_a, p.lora_b, p.lora_bias)
                if t is not None
            ]
            base = None
            if case.add:
                base = torch.zeros(m, n, dtype=dt)
            outs.append(
                alora_linear_reference(
                    leaf,
                    change(p.weight).to(dt),
                    None if p.bias is None else change(p.bias).to(dt),
                    own[0],
                    own[1],
                    mask,
                    scaling,
                    lora_bias=own[2] if len(own) > 2 else None,
                    dropout_p=case.dropout,
                    seed=call.seed,
                    prefix_grad=case.prefix_grad,
                    base_out=base,
                )
            )
            leaves += own
        grads = torch.autograd.grad(
            outs, leaves, [change(d).to(dt) for d in dys], allow_unused=True
        )
        return [*outs, *grads]

    sender = make_sender(case.arch, case.reverse, csrc, case.machine, case.order)
    backend: Backend = other or CudaBackend()
    if not gpu and other is None:
        backend = CudaBackend(sender, (case.machine, int(case.arch[3:5])))
    given = [torch.zeros(m, n, dtype=dtype) for _ in projections] if case.add else None
    todo = [p._replace(weight=None, bias=None) if case.add else p for p in projections]
    ys, xa = backend.forward(call, case.strategy, x, todo, given, backward)
    if not backward:
        owns = errors_of_pytorch(expected, dtype)
        for y, true, own in zip(ys, expected(torch.float64), owns):
            assert true is not None
            assert_error("y", y, true, own, dtype)
        return sender
    got = backend.backward(call, case.strategy, x, todo, xa, dys, asked.needs)
    flat: list[Any] = [*ys, got.x]
    names = [f"y{i}" for i in range(case.count)] + ["dx"]
    for i, p in enumerate(projections):
        flat += [got.lora_a[i], got.lora_b[i]] + ([] if p.lora_bias is None else [got.lora_bias[i]])
        names += [f"dA{i}", f"dB{i}"] + ([] if p.lora_bias is None else [f"dbias{i}"])
        assert got.lora_a[i].dtype == got.lora_b[i].dtype == p.lora_a.dtype
    exact, owns = expected(torch.float64), errors_of_pytorch(expected, dtype)
    assert len(flat) == len(exact)
    sender.results, sender.errors = dict(zip(names, flat)), dict(zip(names, owns))
    for name, value, true, own in zip(names, flat, exact, owns):
        assert_error(name, value, torch.zeros_like(value) if true is None else true, own, dtype)
    if not case.prefix_grad:
        assert (got.x[~mask] == 0).all()
    return sender
