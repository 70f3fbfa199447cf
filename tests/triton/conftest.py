"""How the kernels are run: ALORA_TRITON_MODE = interpret | ptx:sm_80 | ptx:sm_90 | ... | gpu.

Without it: on the GPU if there is one; else the `ptx` cases run as compiled PTX on the CPU for
every arch, and `test_interpreter.py` starts a process of its own for Triton's interpreter, because
TRITON_INTERPRET is read when `@jit` decorates.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

PTX_MODES = ("ptx:sm_80", "ptx:sm_90", "ptx:sm_100", "ptx:sm_120")
CHOSEN = os.environ.get("ALORA_TRITON_MODE")
if CHOSEN == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def why_no_interpreter() -> str | None:
    """Why Triton's interpreter cannot run here, or None."""
    if _version(triton.__version__) < (3, 7) and _version(np.__version__) >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} turns arrays into Python numbers, "
            f"which numpy {np.__version__} refuses"
        )
    return None


def modes() -> tuple[str, ...]:
    if CHOSEN:
        return (CHOSEN,)
    return ("gpu",) if torch.cuda.is_available() else PTX_MODES


@dataclass(frozen=True)
class Place:
    """Where a test's tensors live and what runs its kernels."""

    mode: str
    device: str

    @property
    def compiled(self) -> bool:
        return self.mode.startswith("ptx:")


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    mode = request.param
    with contextlib.ExitStack() as stack:
        if mode.startswith("ptx:"):
            from ..ptx.triton_driver import on_cpu

            stack.enter_context(on_cpu(mode))
        yield Place(mode, "cuda" if mode == "gpu" else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that takes `place` runs in every mode; through PTX only those marked `ptx`."""
    if "place" not in metafunc.fixturenames:
        return
    covering = metafunc.definition.get_closest_marker("ptx") is not None
    wanted = [m for m in modes() if covering or not m.startswith("ptx:")]
    metafunc.parametrize("place", wanted or ["nowhere"], indirect=True, ids=wanted or ["nowhere"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, without a word, what no chosen mode runs."""
    callspecs = [getattr(item, "callspec", None) for item in items]
    gone = [i for i, c in zip(items, callspecs) if c and c.params.get("place") == "nowhere"]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [i for i in items if i not in set(gone)]


@pytest.fixture
def seed() -> int:
    """A fresh seed; set ALORA_TEST_SEED to repeat a failure."""
    seed = int(os.environ.get("ALORA_TEST_SEED", np.random.SeedSequence().generate_state(1)[0]))
    print(f"ALORA_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed
