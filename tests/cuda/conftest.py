"""Fresh random inputs with the seed in every failure's output, and nvcc where a test needs it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from .ptx_sender import NVCC


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that execute kernels need nvcc to compile them to PTX; its absence is told."""
    if NVCC is None:
        for item in items:
            if item.get_closest_marker("ptx") and "cuda" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="no nvcc on PATH to compile csrc to PTX"))


@pytest.fixture
def seed() -> int:
    """A fresh seed; set ALORA_TEST_SEED to repeat a failure."""
    seed = int(os.environ.get("ALORA_TEST_SEED", np.random.SeedSequence().generate_state(1)[0]))
    print(f"ALORA_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an unwritten output fails."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
