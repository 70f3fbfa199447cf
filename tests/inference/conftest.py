"""A fresh seed for each test, printed."""

from __future__ import annotations

import random

import pytest


@pytest.fixture
def seed() -> int:
    value = random.randrange(2**31)
    print(f"seed {value}")
    return value
