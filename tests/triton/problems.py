"""Problems for the kernels' tests: what is run, and its comparison with the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alora_kernels.activation import Activation
from alora_kernels.backends.triton.target import interpreting
from alora_kernels.functional import alora_add, alora_linear, alora_linear_group
from alora_kernels.reference import alora_linear_reference

from ..oracle import Change, assert_error, errors_of_pytorch


@dataclass(frozen=True)
class Case:
    """One call of the public function and its backward pass."""

    strategy: str = "tail"
    dtype: torch.dtype = torch.float32
    size: tuple[int, int, int, int] = (37, 70, 90, 24)  # M, K, N, R
    active: float = 0.4
    scattered: bool = True  # else a suffix
    adapter: torch.dtype | None = None
    precision: str = "compute"
    p: float = 0.0
    prefix: bool = True
    known: bool = True  # whether the host knows the number of active rows
    count: int = 1
    add: bool = False
    lora_bias: bool = True
    strided: bool = True
    wants: str = "xab"  # gradients of x, lora_a, lora_b

    def __str__(self) -> str:
        shown = [
            self.strategy,
            str(self.dtype).removeprefix("torch."),
            "x".join(map(str, self.size)),
        ]
        default = Case()
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name not in ("strategy", "dtype", "size") and value != getattr(default, name):
                shown.append(f"{name}={str(value).removeprefix('torch.')}")
        return "-".join(shown)


class Problem:
    """Random tensors of a case; `run()` calls the package, `expected()` the reference."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        self.case = case
        m, k, n, r = case.size
        dtype, adapter = case.dtype, case.adapter or case.dtype
        self.mask = torch.rand(m) < case.active
        if not case.scattered:
            self.mask = torch.arange(m) >= m - round(case.active * m)
        self.mask = self.mask.to(device)
        self.activation = Activation.from_mask(self.mask)
        if not case.known:
            a = self.activation
            self.activation = Activation(a.row_adapter, a.active_rows, a.active_count)
        self.key = torch.tensor([-(seed + 2**40)], device=device)

        def random(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape) * scale).to(device, to)

        self.x = random(m, 2 * k)[:, ::2] if case.strided else random(m, k)
        self.bases = [random(m, n) for _ in range(case.count)]
        self.layers = []
        for i in range(case.count):
            weight = (
                random(k, n, scale=k**-0.5).t() if case.strided else random(n, k, scale=k**-0.5)
            )
            self.layers.append((
                weight, random(n) if i != 1 else None,
                random(r, k, scale=k**-0.5, to=adapter), random(n, r, scale=r**-0.5, to=adapter),
                1.5 - 0.5 * i, random(n, to=adapter) if case.lora_bias else None,
            ))  # fmt: skip
        self.dys = [random(n, m).t() if case.strided else random(m, n) for _ in range(case.count)]

    def leaves(
        self, dtype: torch.dtype | None, change: Change = lambda t: t
    ) -> tuple[Tensor, list[list[Tensor | None]]]:
        """x, and [lora_a, lora_b, lora_bias] of each layer, in `dtype` or as they are."""
        rounded = self.case.dtype if self.case.precision == "compute" and dtype else None

        def leaf(t: Tensor | None, wanted: bool, to_rounded: torch.dtype | None) -> Tensor | None:
            if t is None:
                return None
            t = change(t)
            t = t if to_rounded is None else t.to(to_rounded)
            return (t if dtype is None else t.to(dtype)).detach().requires_grad_(wanted)

        wants = self.case.wants
        x = leaf(self.x, "x" in wants, None)
        assert x is not None
        return x, [
            [
                leaf(a, "a" in wants, rounded),
                leaf(b, "b" in wants, rounded),
                leaf(c, "b" in wants, rounded),
            ]
            for _, _, a, b, _, c in self.layers
        ]

    def run(self, strategy: str | None = None, grad: bool = True) -> list[Tensor | None]:
        """Outputs, then the gradients of x and of every layer's adapter."""
        case = self.case
        x, adapters = self.leaves(None)
        options = {
            "dropout_p": case.p, "seed": self.key if case.p else None, "backend": "triton",
            "strategy": strategy or case.strategy, "prefix_grad": case.prefix,
            "adapter_precision": case.precision,
        }  # fmt: skip
        with torch.set_grad_enabled(grad):
            if case.add:
                outs = [
                    alora_add(base, x, a, b, self.activation, layer[4], lora_bias=c, **options)
                    for base, layer, (a, b, c) in zip(self.bases, self.layers, adapters)
                ]
            elif case.count > 1:
                group = [
                    (w, bias, a, b, s, c)
                    for (w, bias, _, _, s, _), (a, b, c) in zip(self.layers, adapters)
                ]
                outs = list(alora_linear_group(x, group, self.activation, **options))
            else:
                (w, bias, _, _, s, _), (a, b, c) = self.layers[0], adapters[0]
                outs = [alora_linear(x, w, bias, a, b, self.activation, s, lora_bias=c, **options)]
        return self._with_grads(outs, x, adapters, self.dys) if grad else [*outs]

    def expected(self, dtype: torch.dtype, change: Change = lambda t: t) -> list[Tensor | None]:
        """The reference's outputs and gradients, computed in `dtype`."""
        case = self.case
        x, adapters = self.leaves(dtype, change)
        outs = []
        for base, (w, bias, _, _, s, _), (a, b, c) in zip(self.bases, self.layers, adapters):
            outs.append(alora_linear_reference(
                x, change(w).to(dtype), None if bias is None else change(bias).to(dtype), a, b,
                self.mask, s,
                lora_bias=c, dropout_p=case.p, seed=self.key, prefix_grad=case.prefix,
                adapter_precision=case.precision,
                base_out=change(base).to(dtype) if case.add else None,
            ))  # fmt: skip
        return self._with_grads(outs, x, adapters, [change(d).to(dtype) for d in self.dys])

    def _with_grads(
        self, outs: list[Tensor], x: Tensor, adapters: list[list[Tensor | None]],
        dys: list[Tensor],
    ) -> list[Tensor | None]:  # fmt: skip
        leaves = [x, *(t for layer in adapters for t in layer)]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(outs, wanted, dys, allow_unused=True))
        grads = [next(found) if t is not None and t.requires_grad else None for t in leaves]
        return [*outs, *grads]

    def check(self, got: list[Tensor | None]) -> None:
        """Every result is at most twice as far from float64 as PyTorch's in the same dtype."""
        dtype = self.case.dtype
        exact, owns = self.expected(torch.float64), errors_of_pytorch(self.expected, dtype)
        if interpreting() and dtype == torch.bfloat16:
            # Triton's interpreter truncates to bfloat16 where a GPU rounds: twice the error.
            # The compiled kernels are held to the true bound.
            owns = [2 * own for own in owns]
        names = [f"y{i}" for i in range(self.case.count)] + ["dx"]
        names += [f"{n}{i}" for i in range(self.case.count) for n in ("dA", "dB", "dbias")]
        x, adapters = self.leaves(None)
        leaves = [x, *(t for layer in adapters for t in layer)]
        wanted = [True] * self.case.count + [t is not None and t.requires_grad for t in leaves]
        for name, g, e, own, want in zip(names, got, exact, owns, wanted):
            if not want:
                assert g is None, f"{name} was computed though nobody wants it"
                continue
            assert g is not None, f"{name} is None"
            assert_error(name, g, torch.zeros_like(g) if e is None else e, own, dtype)
