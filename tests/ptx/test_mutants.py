"""Every seeded fault is reported, with kernel, PTX line, source line, block, thread and address."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest

from .formats import PtxError
from .mutants import CUDA, Mutant
from .nvcc import KERNELS, WHY_NOT, cache, compiled
from .parser import Module
from .small_kernels import CASES

pytestmark = pytest.mark.ptx


def assert_located(fault: PtxError, kernel: str, addressed: bool) -> None:
    """The report says where the fault is."""
    assert fault.kernel == kernel and fault.block is not None and fault.thread is not None
    assert fault.line and fault.source and fault.text
    if addressed:
        assert fault.address is not None


@functools.cache
def kernel_span(source: str, kernel: str) -> tuple[str, int, int]:
    """A source's text, and where one kernel lies in it."""
    text = (KERNELS / f"{source}.cu").read_text()
    start = text.index(f" {kernel}(")
    end = text.find('extern "C"', start)
    return text, start, len(text) if end < 0 else end


def mutated(mutant: Mutant) -> Module:
    """The kernel's source with the fault seeded, compiled."""
    source, arch, _ = CASES[mutant.kernel]
    text, start, end = kernel_span(source, mutant.kernel)
    body = text[start:end]
    assert mutant.old in body, f"{mutant.name}: the kernel no longer holds {mutant.old!r}"
    changed = text[:start] + body.replace(mutant.old, mutant.new, 1) + text[end:]
    slug = re.sub(r"\W+", "_", f"{mutant.kernel} {mutant.name}")
    path = cache() / f"{slug}.cu"
    if not path.exists() or path.read_text() != changed:
        path.write_text(changed)
    return Module(compiled(path, arch, ["-ptx", "-lineinfo"]).read_text())


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize("mutant", CUDA, ids=lambda m: f"{m.kernel}: {m.name}")
def test_fault_is_reported(mutant: Mutant, rng: np.random.Generator) -> None:
    module = mutated(mutant)
    with pytest.raises(PtxError, match=mutant.report) as caught:
        CASES[mutant.kernel][2](module, rng, "lockstep")
    assert_located(caught.value, mutant.kernel, mutant.addressed)
