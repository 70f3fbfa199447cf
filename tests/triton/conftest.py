"""The kernels run in Triton's interpreter, in a process of their own unless a GPU is here."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch


@pytest.fixture
def seed() -> int:
    """A fresh seed; set ALORA_TEST_SEED to repeat a failure."""
    seed = int(os.environ.get("ALORA_TEST_SEED", np.random.SeedSequence().generate_state(1)[0]))
    print(f"ALORA_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed
