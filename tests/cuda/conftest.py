"""nvcc where a test needs it, and memory that shows what was not written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .ptx_sender import NVCC
from .stub import extension

__all__ = ["extension", "poisoned"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that execute kernels need nvcc to compile them to PTX; its absence is told."""
    if NVCC is None:
        for item in items:
            if item.get_closest_marker("ptx") and "cuda" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="no nvcc on PATH to compile csrc to PTX"))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an unwritten output fails."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
