"""Fresh random inputs for every test, with the seed in a failure's output."""

from __future__ import annotations

import os
import time

# On a CPU with AMX, oneDNN's 16-bit products read one element past a row of odd length. Tests fill
# memory with NaN, and 0 · NaN would spoil PyTorch's own results, which they compare with. Set
# before torch is loaded; `core/test_amx.py` runs without it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# Tests are to show what is wrong on a GPU: no backend is left out by a verdict, none tested first.
os.environ.setdefault("ALORA_SELFTEST", "0")

import numpy as np
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive",
        nargs="?",
        const="1/1",
        metavar="I/N",
        help="every combination of a kernel test's factors instead of every pair; with I/N the "
        "I-th of N disjoint parts of them, each a fair sample",
    )
    parser.addoption(
        "--strength",
        type=int,
        default=2,
        metavar="T",
        help="a kernel test's cases show every T levels of different factors together (2: pairs)",
    )


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch afresh; set ALORA_TEST_SEED to repeat a failure."""
    seed = int(os.environ.get("ALORA_TEST_SEED", np.random.SeedSequence().generate_state(1)[0]))
    print(f"ALORA_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what would begin after ALORA_TEST_BUDGET seconds: a tier that grows shrinks itself."""
    budget = float(os.environ.get("ALORA_TEST_BUDGET", "inf"))
    if time.monotonic() - _began > budget:
        pytest.skip(f"the tier's budget of {budget:.0f} s is spent")


_began = time.monotonic()
