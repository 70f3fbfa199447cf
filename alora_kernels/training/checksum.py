"""A checksum of a tensor's bytes, computed where the tensor lies.

    Σ over rows c and columns i of  m_c · w_i · v_ci   (mod 2⁶⁴)

v are the tensor's 32-bit words in rows of 65536; the m_c and w_i are fixed, odd and random. An odd
factor is invertible, so the change of a single word always shows. So does an exchange of two words
of a row, because no two w_i agree in their low 33 bits; any other edit is missed with a chance of
about 2⁻⁶⁴ (2⁻³² in the worst, an exchange across rows of words that differ in their top bit alone).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

ROW = 1 << 16
# Words at once: what a core's cache holds on a CPU, what keeps a GPU busy.
AT_ONCE = {"cpu": ROW}
ON_DEVICE = ROW << 7


def checksum(tensor: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device, of all bytes in their order."""
    with torch.no_grad():
        words = _words(tensor.detach())
        factors = _factors(tensor.device)
        step = AT_ONCE.get(tensor.device.type, ON_DEVICE) // ROW
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        rows = words.numel() // ROW
        whole, rest = words[: rows * ROW].view(rows, ROW), words[rows * ROW :]
        for begin in range(0, rows, step):
            block = whole[begin : begin + step]
            sums = (block * factors).sum(1)
            total += (sums * _of_rows(begin, len(block), tensor.device)).sum()
        if len(rest):
            total += (rest * factors[: len(rest)]).sum() * _of_rows(rows, 1, tensor.device)[0]
        return total


def checksums(tensors: list[Tensor]) -> list[int]:
    """The checksum of each tensor, with one copy from each device."""
    found = [checksum(tensor) for tensor in tensors]
    values = [0] * len(found)
    for device in dict.fromkeys(value.device for value in found):
        places = [i for i, value in enumerate(found) if value.device == device]
        for i, value in zip(places, torch.stack([found[i] for i in places]).tolist()):
            values[i] = value
    return values


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as int32, zeros behind them."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    data = tensor.resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() % 4 or data.storage_offset() % 4:
        padded = data.new_zeros(-(-data.numel() // 4) * 4)
        padded[: data.numel()] = data
        data = padded
    return data.view(torch.int32)


def _random(begin: int, count: int) -> np.ndarray:
    """Numbers `begin` … of a fixed sequence of odd 64-bit integers (SplitMix64)."""
    z = (np.arange(begin + 1, begin + count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


@cache
def _factors(device: torch.device) -> Tensor:
    return torch.from_numpy(_distinct(ROW)).to(device)


def _distinct(count: int) -> np.ndarray:
    """The first `count` of the sequence whose low 33 bits have not come before."""
    candidates = _random(1 << 40, 2 * count)
    _, first = np.unique(candidates & ((1 << 33) - 1), return_index=True)
    return candidates[np.sort(first)][:count].copy()


def _of_rows(begin: int, count: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_random(begin, count)).to(device)
