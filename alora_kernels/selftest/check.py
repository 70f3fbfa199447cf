"""One case: forward and backward by a backend, twice, against the reference."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activation import Activation
from ..backends.reference import gradients, outputs
from ..contract import DEFAULTS, Backend, Call, Gradients, Needs, Projection
from .accuracy import excess
from .cases import Case

SEED = 20251
SCALING = 1.5
# A few numbers are a poor measure of PyTorch's error: they get an allowance of their own.
FEW, ULPS = 64, 4.0


class WrongResult(Exception):
    """A result is further from the truth than rounding explains, or differs from run to run."""


class Inputs(NamedTuple):
    """What a backend is asked with."""

    call: Call
    x: Tensor  # [M, K]
    projections: list[Projection]
    base_outs: list[Tensor] | None  # [M, N] each
    dys: list[Tensor]  # [M, N] each
    needs: Needs

    def in_dtype(self, dtype: torch.dtype) -> Inputs:
        """The same operands, adapters rounded as kernels round them, for PyTorch in `dtype`."""
        rounded = self.x.dtype

        def to(t: Tensor | None, adapter: bool = False) -> Any:
            return None if t is None else (t.to(rounded) if adapter else t).to(dtype)

        projections = [
            Projection(
                to(p.weight), to(p.bias), to(p.lora_a, True), to(p.lora_b, True),
                to(p.lora_bias, True),
            )
            for p in self.projections
        ]  # fmt: skip
        return self._replace(
            x=to(self.x),
            projections=projections,
            base_outs=None if self.base_outs is None else [to(t) for t in self.base_outs],
            dys=[to(t) for t in self.dys],
        )


def make_inputs(case: Case, device: torch.device | str) -> Inputs:
    """Random operands at the scale of a trained layer, the same ones on every call."""
    device = torch.device(device)
    here = torch.Generator("cpu").manual_seed(SEED)
    # (Nothing is drawn on "meta": there only layouts matter.)
    there = None if device.type == "meta" else torch.Generator(device).manual_seed(SEED)
    m, k, n, r = case.rows, case.depth, case.width, case.rank
    dtype, adapter = case.torch_dtype, case.adapter_dtype

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=there, device=device) * scale).to(dtype)

    mask = {
        "none": lambda: torch.zeros(m, dtype=torch.bool),
        "one": lambda: torch.arange(m) == m // 2,
        "some": lambda: torch.rand(m, generator=here) < 0.3,
        "half": lambda: torch.arange(m) >= m // 2,
        "all": lambda: torch.ones(m, dtype=torch.bool),
    }[case.active]()
    activation = Activation.from_mask(mask)
    if not case.known:
        activation = Activation(
            activation.row_adapter, activation.active_rows, activation.active_count
        )
    projections = []
    for _ in range(case.count):
        weight = None if case.base_given else normal(n, k, scale=k**-0.5)
        bias = normal(n) if case.biases and not case.base_given else None
        lora_a = normal(r, k, scale=k**-0.5, dtype=adapter)
        lora_b = normal(n, r, scale=r**-0.5, dtype=adapter)
        lora_bias = normal(n, dtype=adapter) if case.biases else None
        projections.append(Projection(weight, bias, lora_a, lora_b, lora_bias))
    dys = [
        normal(1, n).expand(m, n) if case.repeated_dy else normal(m, n) for _ in range(case.count)
    ]
    options = DEFAULTS._replace(dropout_p=case.dropout_p, prefix_grad=case.prefix_grad)
    seed = torch.tensor([SEED - 2**40], device=device) if case.dropout_p else None
    call = Call(activation.to(device), (SCALING,) * case.count, options, seed)
    given = [normal(m, n) for _ in projections] if case.base_given else None
    wanted = (True,) * case.count
    needs = Needs(case.x_grad, wanted, wanted, (case.biases,) * case.count)
    return Inputs(call, normal(m, k), projections, given, dys, needs)


def run(backend: Backend, case: Case, asked: Inputs) -> dict[str, Tensor]:
    """Everything that the backend computes, by name."""
    call, x, projections, given, dys, needs = asked
    base_outs = None if given is None else [t.clone() for t in given]
    ys, xa = backend.forward(call, case.strategy, x, projections, base_outs, case.backward)
    ys = [y.view(case.rows, case.width) for y in ys]
    if not case.backward:
        return _named(ys, None)
    found = backend.backward(call, case.strategy, x, projections, xa, dys, needs)
    return _named(ys, found)


def expected(case: Case, asked: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference's results with every operand in `dtype`."""
    call, x, projections, given, dys, needs = asked.in_dtype(dtype)
    with torch.no_grad():
        ys = outputs(call, x, projections, given)
    if not case.backward:
        return _named(ys, None)
    return _named(ys, gradients(call, x, projections, dys, needs))


def _named(ys: list[Tensor], found: Gradients | None) -> dict[str, Tensor]:
    results = {f"y{i}": y for i, y in enumerate(ys)}
    if found is not None:
        named = {"x": found.x}
        for name in ("lora_a", "lora_b", "lora_bias"):
            named |= {f"{name}{i}": grad for i, grad in enumerate(getattr(found, name))}
        results |= {f"the gradient of {n}": g for n, g in named.items() if g is not None}
    return results


def check(backend: Backend, case: Case, device: torch.device | str, poison: bool = True) -> None:
    """Raise WrongResult unless `backend` is right in `case`, twice with the same bits.

    With `poison` fresh memory holds NaN, so that an element that nobody writes is wrong. The second
    run finds the workspace as the first has left it.
    """
    asked = make_inputs(case, device)
    with poisoned() if poison else contextlib.nullcontext():
        first = run(backend, case, asked)
        again = run(backend, case, asked)
    truth, own = (expected(case, asked, d) for d in (torch.float64, case.torch_dtype))
    if first.keys() != truth.keys():
        raise WrongResult(f"results {sorted(first)}, expected {sorted(truth)}")
    for name, got in first.items():
        wrong = excess(got, truth[name], own[name])
        if wrong is not None and not _negligible(got, truth[name]):
            raise WrongResult(f"{name}: {wrong}")
        if not torch.equal(got, again[name]):
            raise WrongResult(f"{name}: a second run of the same call gives other bits")


def _negligible(got: Tensor, truth: Tensor) -> bool:
    """Whether a result of few elements is off by no more than some roundings of the largest."""
    if got.numel() > FEW or got.shape != truth.shape:
        return False
    allowed = ULPS * torch.finfo(got.dtype).eps * float(truth.abs().amax())
    return bool((got.double() - truth).abs().amax() <= allowed)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh floating-point memory holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that may vary: they are the vendor's
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def made(implementation: str) -> tuple[Backend, set[str]]:
    """A backend of its own from "module:Class", and the CUDA kernels that it has launched."""
    from ..backends.cuda import CudaBackend
    from ..backends.cuda.run import ready
    from ..backends.programs import Program, Run

    module, _, name = implementation.partition(":")
    kind = getattr(importlib.import_module(module), name)
    launched: set[str] = set()
    if kind is not CudaBackend:
        return kind(), launched

    def remembering(program: Program) -> Run:
        launched.update(launch.plan.kernel for launch in program.launches)
        return ready(program)

    return CudaBackend(remembering), launched
