"""Problems in vLLM's LoRA layout, and what the reference says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alora_kernels import alora_linear_reference

from ..oracle import Change, assert_error, errors_of_pytorch

# What a row's slot may look like in one batch; −1 is a row without an adapter.
BATCHES: dict[str, Callable[[int, int], Tensor]] = {
    "scattered": lambda m, n: torch.randint(-1, n, (m,)),
    "prefill of an aLoRA": lambda m, n: torch.cat(
        [torch.full((m - m // 3,), -1), torch.full((m // 3,), n - 1)]
    ),
    "requests one after another": lambda m, n: torch.arange(m) * (n + 1) // m - 1,
    "every row one adapter": lambda m, n: torch.full((m,), n // 2),
    "no adapter": lambda m, n: torch.full((m,), -1),
    "alternating": lambda m, n: torch.arange(m) % (n + 1) - 1,
}


@dataclass
class Layer:
    """One layer's slots, a batch, and the base layer's output."""

    x: Tensor  # [M, K]
    base: Tensor  # [M, Σ N_i]
    lora_a: tuple[Tensor, ...]  # [n, 1, R, K] for each slice
    lora_b: tuple[Tensor, ...]  # [n, 1, N_i, R] for each slice
    indices: Tensor  # int64 [M]
    scale: float

    @property
    def slices(self) -> tuple[int, ...]:
        return tuple(b.shape[2] for b in self.lora_b)

    def expected(self, dtype: torch.dtype, change: Change = lambda t: t) -> list[Tensor]:
        """[y] by the reference, slot by slot and slice by slice, computed in `dtype`."""
        x, y, column = change(self.x).to(dtype), change(self.base).to(dtype).clone(), 0
        for a, b in zip(self.lora_a, self.lora_b):
            part = slice(column, column := column + b.shape[2])
            nothing = torch.zeros(b.shape[2], x.shape[1], dtype=dtype)
            for slot in range(a.shape[0]):
                y[:, part] += alora_linear_reference(
                    x, nothing, None, change(a)[slot, 0].to(dtype), change(b)[slot, 0].to(dtype),
                    self.indices == slot, self.scale,
                )  # fmt: skip
        return [y]

    def check(self, y: Tensor) -> None:
        """`y` is right to the bound; rows without an adapter are the base's, bit for bit."""
        dtype = self.base.dtype
        own = errors_of_pytorch(self.expected, dtype)[0]
        assert_error("y", y, self.expected(torch.float64)[0], own, dtype)
        assert torch.equal(y[self.indices < 0], self.base[self.indices < 0])


def make_layer(
    batch: str = "scattered",
    *,
    rows: int = 37,
    depth: int = 33,
    widths: tuple[int, ...] = (24, 9, 9),
    rank: int = 5,
    slots: int = 3,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    scale: float = 1.5,
) -> Layer:
    """Random tensors."""
    kind = adapter_dtype or dtype
    indices = BATCHES[batch](rows, slots)
    lora_a = tuple((torch.randn(slots, 1, rank, depth) * depth**-0.5).to(kind) for _ in widths)
    lora_b = tuple((torch.randn(slots, 1, n, rank) * rank**-0.5).to(kind) for n in widths)
    x, base = torch.randn(rows, depth).to(dtype), torch.randn(rows, sum(widths)).to(dtype)
    return Layer(x, base, lora_a, lora_b, indices, scale)


def poison_unused(layer: Layer) -> Layer:
    """NaN in every slot that no row runs: whoever reads it is found out."""
    for slot in range(layer.lora_a[0].shape[0]):
        if not (layer.indices == slot).any():
            for stack in (*layer.lora_a, *layer.lora_b):
                stack[slot] = torch.nan
    return layer
