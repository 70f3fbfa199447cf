"""The definition itself: against its formula, and Philox against published answers."""

from __future__ import annotations

import pytest
import torch

from alora_kernels import alora_linear_reference
from alora_kernels.backends.philox import DropMask
from alora_kernels.reference import dropout_threshold, keep_mask

# Random123's known answers for philox4x32-10: counter, key, result.
ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, written from the paper."""
    low = 0xFFFFFFFF
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & low, p0 >> 32 ^ c[3] ^ k[1], p0 & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return c


def test_philox_gives_the_published_answer() -> None:
    for counter, key, answer in ANSWERS:
        assert tuple(philox(list(counter), list(key))) == answer


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_keep_mask_is_philox(p: float) -> None:
    seed = int(torch.randint(-(2**63), 2**63 - 1, (1,)))
    mask = keep_mask(torch.tensor([seed]), p, 5, 11)
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for m in range(5):
        for k in range(11):
            word = philox([k // 4, m, 0, 0], key)[k % 4]
            assert bool(mask[m, k]) == (word >= int(p * 2**32))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (700, 130), (5, 70001)])
def test_cpu_mask_equals_the_reference(shape: tuple[int, int]) -> None:
    rows, columns = shape
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    numbers = torch.randperm(rows + 9)[:rows].sort().values
    want = ~keep_mask(seed, 0.3, rows + 9, columns)[numbers]
    mask = DropMask(int(seed), 0.3, columns)
    got = torch.cat([drop.clone() for _, _, drop in mask.chunks(numbers)])
    assert torch.equal(got, want)


def test_threshold_is_an_integer_of_32_bits() -> None:
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(0.5) == 2**31
    assert dropout_threshold(1 - 2**-40) == 2**32 - 1


def test_formula() -> None:
    x, w, b = torch.randn(6, 5).double(), torch.randn(4, 5).double(), torch.randn(4).double()
    a, lb, c = torch.randn(3, 5).double(), torch.randn(4, 3).double(), torch.randn(4).double()
    mask = torch.tensor([False, True, True, False, False, True])
    y = alora_linear_reference(x, w, b, a, lb, mask, 2.0, lora_bias=c)
    for m in range(6):
        want = w @ x[m] + b
        if mask[m]:
            want = want + 2.0 * (lb @ (a @ x[m]) + c)
        torch.testing.assert_close(y[m], want)
