"""The interface between the package and its backends.

A backend computes a group of masked-LoRA linears that share x, forward and backward. It knows
nothing of modules and nothing of autograd. The tensors that it gets are already checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .activation import Activation

STRATEGIES = ("delta", "tail", "onepass")
PRECISIONS = ("compute", "fp32")  # of the adapter, that a caller may choose


class Projection(NamedTuple):
    """One linear layer of the group with its adapter."""

    weight: Tensor | None  # [N, K]; None if the caller has computed the base output
    bias: Tensor | None  # [N]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    lora_bias: Tensor | None  # [N]


class Options(NamedTuple):
    """How to compute a call. The docstring of `alora_linear` explains each option."""

    dropout_p: float
    prefix_grad: bool
    # "compute", "fp32", or "autocast": like torch, round to x's dtype after each product
    adapter_precision: str
    strict_inactive: bool
    backend: str
    strategy: str


DEFAULTS = Options(
    dropout_p=0.0,
    prefix_grad=True,
    adapter_precision="compute",
    strict_inactive=False,
    backend="auto",
    strategy="auto",
)


class Call(NamedTuple):
    """The parts of a call that are not its tensors x, projections and base outputs."""

    activation: Activation
    scalings: tuple[float, ...]  # one for each projection
    options: Options = DEFAULTS
    seed: Tensor | None = None  # int64 [1] on x's device, read there; None without dropout
    memory: Any = None  # the entry of `run` for calls of this signature; not for backends


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    lora_a: tuple[bool, ...]
    lora_b: tuple[bool, ...]
    lora_bias: tuple[bool, ...]


class Gradients(NamedTuple):
    """Gradients, each with the dtype of its tensor; None if it is not wanted."""

    x: Tensor | None  # [M, K]
    lora_a: list[Tensor | None]
    lora_b: list[Tensor | None]
    lora_bias: list[Tensor | None]


class Problem(NamedTuple):
    """The facts that decide the choice of backend and strategy. No tensors, so it is hashable."""

    rows: int  # M
    in_features: int  # K
    out_features: tuple[int, ...]  # N of each projection
    ranks: tuple[int, ...]  # R of each projection
    active: int  # active rows to plan for
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: str  # "cpu", "cuda", ...
    arch: int = 0  # 80, 90, ... for sm_80, sm_90, ...; 942, ... for gfx942, ...; 0 off such GPUs
    backward: bool = False
    base_given: bool = False  # the caller has computed the base output (alora_add)
    dropout: bool = False
    adapter_precision: str = "compute"
    strict_inactive: bool = False


class Schedule(NamedTuple):
    """The main kernel that a backend would launch: the base, with the strategy's part inside."""

    kernel: str  # "gemm", "decode" (onepass with split K) or "fused" (tail that computes xa itself)
    rows: int  # of a tile
    columns: int  # of a tile, not counting those of lora_a
    full_rate: bool = True  # whether it uses the newest tensor-core instructions of the GPU
    splits: int = 1  # of K


class Backend(Protocol):
    """One implementation of the masked-LoRA linear."""

    name: str

    def why_not_here(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""

    def why_not(self, problem: Problem, strategy: str) -> str | None:
        """Why this backend cannot run `problem` with `strategy`, or None."""

    def forward(
        self,
        call: Call,
        strategy: str,
        x: Tensor,  # [M, K], any strides
        projections: Sequence[Projection],
        base_outs: Sequence[Tensor] | None,  # [M, N] each, changed in place
        save: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """The outputs `[M, N]` (or `[N]` if there is one row) and, with `save`, the low-rank
        activation `xa` for backward.

        With `base_outs` the base is not computed. The adapter's part is added to `base_outs` in
        place, and `base_outs` are returned.
        """

    def backward(
        self,
        call: Call,
        strategy: str,
        x: Tensor,  # [M, K]
        projections: Sequence[Projection],
        xa: Tensor | None,  # what forward saved
        dys: Sequence[Tensor],  # [M, N] each, any strides
        needs: Needs,
    ) -> Gradients:
        """The wanted gradients. A projection without weight adds only the adapter's part to dx."""


def saved_columns(ranks: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Where the columns of each projection begin in the saved `xa`, and the width of `xa`.

    Every projection begins at a multiple of 16 elements, for 16-byte loads.
    """
    begins, total = [], 0
    for rank in ranks:
        begins.append(total)
        total += -(-rank // 16) * 16
    return tuple(begins), total


def saved_dtype(dtype: torch.dtype, adapter_precision: str) -> torch.dtype:
    """dtype of the saved `xa` for an x of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if adapter_precision == "fp32" else dtype
