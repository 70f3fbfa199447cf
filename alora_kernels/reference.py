"""The definition of the masked-LoRA linear in plain PyTorch, to which every test compares.

It runs on any device and in any floating dtype, and autograd differentiates it. It is slow on
purpose: it skips nothing and fuses nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85


def alora_linear_reference(
    x: Tensor,  # [..., K]
    weight: Tensor | None,  # [N, K]
    bias: Tensor | None,  # [N]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    mask: Tensor,  # bool [M], M = rows of the flattened x
    scaling: float,
    *,
    lora_bias: Tensor | None = None,  # [N]
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # int64 [1]
    prefix_grad: bool = True,
    adapter_precision: str = "compute",
    base_out: Tensor | None = None,  # [..., N], in place of x Wᵀ + b
) -> Tensor:
    """y = x Wᵀ + b + scaling · mask ⊙ ((dropout(x) Aᵀ) Bᵀ + lora_bias).

    `adapter_precision="compute"` rounds the adapter to x's dtype. `"fp32"` computes the adapter's
    part in float32, adds it in float32 and rounds once (PEFT's arithmetic). Rows outside the mask
    add nothing to the adapter's outputs and gradients, even if they hold NaN.
    """
    active = mask.unsqueeze(1)  # [M, 1]
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    if base_out is None:
        assert weight is not None
        base = F.linear(
            rows if prefix_grad else torch.where(active, rows, rows.detach()), weight, bias
        )
    else:
        base = base_out.reshape(rows.shape[0], -1)
    selected, factor = active, scaling
    if dropout_p > 0.0:
        assert seed is not None
        selected = active & keep_mask(seed, dropout_p, rows.shape[0], rows.shape[1])
        factor = scaling / (1.0 - dropout_p)
    dtype = x.dtype
    if adapter_precision == "fp32":
        dtype = torch.promote_types(x.dtype, torch.float32)
    inputs = torch.where(selected, rows, 0).to(dtype)
    delta = (inputs @ lora_a.to(dtype).T * factor) @ lora_b.to(dtype).T
    if lora_bias is not None:
        delta = delta + scaling * lora_bias.to(dtype)
    out = (base.to(dtype) + torch.where(active, delta, 0)).to(base.dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def keep_mask(seed: Tensor, dropout_p: float, num_rows: int, num_columns: int) -> Tensor:
    """Dropout's keep mask, bool `[num_rows, num_columns]`, from Philox4x32-10.

    Key = (seed low, seed high), counter = (column ÷ 4, row, 0, 0), word = column mod 4. An element
    is kept if its word is ≥ ⌊p · 2³²⌋. All of this is integer arithmetic, so every backend draws
    the same mask.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = 0xFFFFFFFF
    seed = seed.reshape(()).to(torch.int64)
    k0, k1 = seed & low, (seed >> 32) & low
    c0 = torch.arange(-(-num_columns // 4), device=seed.device).expand(num_rows, -1)
    c1 = torch.arange(num_rows, device=seed.device).unsqueeze(1).expand_as(c0)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # int64 products overflow, but their 64 bits equal those of the unsigned product.
        p0, p1 = PHILOX_M0 * c0, PHILOX_M1 * c2
        c0, c1 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low
        c2, c3 = ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + PHILOX_W0) & low, (k1 + PHILOX_W1) & low
    words = torch.stack([c0, c1, c2, c3], -1).reshape(num_rows, -1)[:, :num_columns]
    return words >= dropout_threshold(dropout_p)


def dropout_threshold(dropout_p: float) -> int:
    """⌊p · 2³²⌋: an element is dropped if its Philox word is smaller."""
    return int(dropout_p * 2**32)
