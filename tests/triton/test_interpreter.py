"""Runs the kernels' tests in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import CHOSEN, why_no_interpreter

pytestmark = [
    pytest.mark.skipif(CHOSEN is not None, reason="ALORA_TRITON_MODE chooses another way to run"),
    pytest.mark.skipif(why_no_interpreter() is not None, reason=str(why_no_interpreter())),
]

HERE = Path(__file__).parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", ""]


def in_the_interpreter(*args: str) -> None:
    result = subprocess.run(
        [*PYTEST, *args],
        env={**os.environ, "ALORA_TRITON_MODE": "interpret", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )
    print(result.stdout[-300:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_covering_cases_in_the_interpreter() -> None:
    in_the_interpreter(str(HERE / "test_linear.py"), "-k", "covering or without_gradients")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_linear.py", "test_numerics.py"])
def test_every_case_in_the_interpreter(name: str) -> None:
    in_the_interpreter(str(HERE / name))
