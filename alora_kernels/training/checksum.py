"""A checksum of a tensor's bytes, computed on the tensor's own device.

    Σ over rows c and columns i of  m_c · w_i · v_ci   (mod 2⁶⁴)

v are the tensor's 32-bit words, in rows of 65536 words. The factors m_c and w_i are fixed random
odd numbers. An odd factor is invertible, so a change of one word always changes the checksum. So
does an exchange of two words in a row, because no two w_i have the same low 33 bits. Any other edit
is missed with a probability of about 2⁻⁶⁴. The worst case is 2⁻³²: an exchange, across rows, of two
words that differ in their top bit alone.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

ROW = 1 << 16
# The number of words per step: few enough for the cache of a CPU core, many enough for a GPU.
AT_ONCE = {"cpu": ROW}
ON_DEVICE = ROW << 7


def checksum(tensor: Tensor) -> Tensor:
    """The checksum of all bytes in their order, an int64 scalar on the tensor's device."""
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
    """The checksum of each tensor. Each device copies its results to the host once."""
    found = [checksum(tensor) for tensor in tensors]
    values = [0] * len(found)
    for device in dict.fromkeys(value.device for value in found):
        places = [i for i, value in enumerate(found) if value.device == device]
        for i, value in zip(places, torch.stack([found[i] for i in places]).tolist()):
            values[i] = value
    return values


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as int32, padded with zeros."""
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
    """`count` numbers, from index `begin`, of a fixed sequence of odd integers (SplitMix64)."""
    z = (np.arange(begin + 1, begin + count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


@cache
def _factors(device: torch.device) -> Tensor:
    return torch.from_numpy(_distinct(ROW)).to(device)


def _distinct(count: int) -> np.ndarray:
    """The first `count` numbers of the sequence that all differ in their low 33 bits."""
    candidates = _random(1 << 40, 2 * count)
    _, first = np.unique(candidates & ((1 << 33) - 1), return_index=True)
    return candidates[np.sort(first)][:count].copy()


def _of_rows(begin: int, count: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_random(begin, count)).to(device)
