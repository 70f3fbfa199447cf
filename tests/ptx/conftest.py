"""Fresh random inputs for the interpreter's tests, with the seed in every failure's output."""

from __future__ import annotations

import os

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fresh seed; set ALORA_TEST_SEED to repeat a failure."""
    seed = int(os.environ.get("ALORA_TEST_SEED", np.random.SeedSequence().generate_state(1)[0]))
    print(f"ALORA_TEST_SEED={seed}")
    return np.random.default_rng(seed)
