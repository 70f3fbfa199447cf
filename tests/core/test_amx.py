"""16-bit products with every instruction that this CPU has, AMX among them where it has it."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import torch
from alora_kernels import Activation, alora_linear

for rank in (5, 15, 17, 31, 33):
    for rows in (3, 40, 100):
        scratch = [torch.full((4096,), float("nan")) for _ in range(8)]
        del scratch  # fresh memory may hold NaN
        x, weight = torch.randn(rows, 64).bfloat16(), torch.randn(48, 64).bfloat16()
        a, b = torch.randn(rank, 64).bfloat16(), torch.randn(48, rank).bfloat16()
        leaves = [t.requires_grad_() for t in (x, a, b)]
        y = alora_linear(x, weight, None, a, b, Activation.from_starts([1], rows), 0.5)
        grads = torch.autograd.grad(y.float().sum(), leaves)
        assert all(t.isfinite().all() for t in (y, *grads)), (rank, rows)
"""


def test_odd_ranks_read_nothing_beside_their_rows():
    environment = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=environment)
