"""The contract: what the package and its backends say to each other.

A backend computes one group of masked-LoRA linears that share x, forward and backward. It knows
nothing of modules and nothing of autograd; it is handed tensors that were checked already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .activation import Activation

STRATEGIES = ("delta", "tail", "onepass")


class Projection(NamedTuple):
    """One linear layer of the group with its adapter."""

    weight: Tensor | None  # [N, K]; None when the caller computed the base output itself
    bias: Tensor | None  # [N]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    lora_bias: Tensor | None  # [N]


class Options(NamedTuple):
    """How a call is to be computed. The public functions say what each option means."""

    dropout_p: float
    prefix_grad: bool
    # "compute", "fp32", or "autocast": rounded to x's dtype after each product, as torch rounds
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
    """What a call asks for beside its tensors."""

    activation: Activation
    scalings: tuple[float, ...]  # one for each projection
    options: Options = DEFAULTS
    seed: Tensor | None = None  # int64 [1] on x's device, read there; None without dropout
    memory: Any = None  # what `run` remembers of calls of this signature; nothing for a backend


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    lora_a: tuple[bool, ...]
    lora_b: tuple[bool, ...]
    lora_bias: tuple[bool, ...]


class Gradients(NamedTuple):
    """Gradients in the dtypes of the tensors they belong to; None where not wanted."""

    x: Tensor | None  # [M, K]
    lora_a: list[Tensor | None]
    lora_b: list[Tensor | None]
    lora_bias: list[Tensor | None]


class Problem(NamedTuple):
    """What a choice of backend and strategy depends on. No tensors: hashable, testable."""

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
    base_given: bool = False  # alora_add: the base output was computed elsewhere
    dropout: bool = False
    adapter_precision: str = "compute"
    strict_inactive: bool = False


class Backend(Protocol):
    """One way to compute the operation."""

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
        base_outs: Sequence[Tensor] | None,  # [M, N] each, to be added to in place
        save: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """The outputs `[M, N]` (`[N]` will do for one row) and, with `save`, the low-rank
        activation for backward.

        With `base_outs` the base is not computed: the adapter's part is added to those tensors,
        which are returned.
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
        """The wanted gradients. Projections without a weight add only the adapter's part to dx."""


def saved_columns(ranks: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Where each projection's columns begin in the saved `xa`, and how many columns it has.

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
