"""Small correct kernels compiled by nvcc: the right result and no report, whatever the order."""

from __future__ import annotations

import numpy as np
import pytest

from .nvcc import WHY_NOT, module_of
from .small_kernels import CASES, ORDERS

pytestmark = [pytest.mark.ptx, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", CASES)
def test_correct_kernel(kernel: str, order: str, rng: np.random.Generator) -> None:
    source, arch, case = CASES[kernel]
    case(module_of(source, arch), rng, order)
