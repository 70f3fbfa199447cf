"""A benchmark sets the threads of torch; the next test finds them as they were."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
