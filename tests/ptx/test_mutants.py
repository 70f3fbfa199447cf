"""Every seeded fault is reported, with kernel, PTX line, source line, block, thread and address."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest

from .formats import PtxError
from .mutants import CUDA, DEADLOCK, NOT_WAITED, OUTSIDE, RACE, Mutant
from .nvcc import KERNELS, WHY_NOT, cache, compiled
from .parser import Module
from .small_kernels import CASES
from .triton_driver import Mutation
from .triton_kernels import CASES as TRITON_CASES

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


def edit(pattern: str, replacement: str, which: int = 0) -> Mutation:
    """Replace the `which`-th match of a pattern in the PTX (-1: the last)."""

    def mutate(text: str) -> str:
        found = list(re.finditer(pattern, text))
        assert found, f"the PTX holds no {pattern}"
        m = found[which]
        return text[: m.start()] + m.expand(replacement) + text[m.end() :]

    return mutate


_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, [^;]*;"
TRITON = [
    ("aligned", "sm_80", "no cp.async wait", edit(r"cp\.async\.wait_group\s+\w+;", ""), NOT_WAITED),
    (
        "aligned",
        "sm_80",
        "waits for too few",
        edit(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 4;"),
        NOT_WAITED,
    ),
    ("aligned", "sm_80", "no barrier", edit(r"bar\.sync\s+0;", ""), f"{RACE}|{NOT_WAITED}|uninit"),
    ("aligned", "sm_80", "no barrier at the end", edit(r"bar\.sync\s+0;", "", -1), RACE),
    ("matmul", "sm_80", "unmasked store", edit(r"@%p\d+ (st\.global)", r"\1", -1), OUTSIDE),
    (
        "descriptor",
        "sm_90",
        "full not waited for",
        edit(_WAIT, "setp.eq.u32 complete, 0, 0;"),
        NOT_WAITED,
    ),
    (
        "descriptor",
        "sm_90",
        "too many bytes",
        edit(r"(arrive\.expect_tx[^;]*), \d+;", r"\1, 32768;"),
        DEADLOCK,
    ),
    (
        "descriptor",
        "sm_90",
        "no wgmma.fence",
        edit(r"wgmma\.fence\.sync\.aligned;", ""),
        "no wgmma.fence",
    ),
    (
        "descriptor",
        "sm_90",
        "no commit",
        edit(r"wgmma\.commit_group\.sync\.aligned;", ""),
        NOT_WAITED,
    ),
    (
        "descriptor",
        "sm_90",
        "no wgmma wait",
        edit(r"wgmma\.wait_group\.sync\.aligned \d+;", "", -1),
        NOT_WAITED,
    ),
    (
        "descriptor",
        "sm_90",
        "no proxy fence before the store",
        edit(r"fence\.proxy\.async\.shared::cta;", "", -1),
        "no proxy fence",
    ),
    (
        "descriptor",
        "sm_90",
        "store not waited for",
        edit(r"cp\.async\.bulk\.wait_group(\.read)?\s+0;", "", -1),
        "block exits",
    ),
    (
        "descriptor",
        "sm_100",
        "no tcgen05 commit",
        edit(r"@%p\d+ tcgen05\.commit[^;]*;", ""),
        DEADLOCK,
    ),
    (
        "descriptor",
        "sm_100",
        "memory not given back",
        edit(r"@%p\d+ tcgen05\.dealloc[^;]*;", ""),
        "without giving",
    ),
    (
        "descriptor",
        "sm_100",
        "product not waited for",
        edit(_WAIT, "setp.eq.u32 complete, 0, 0;", -1),
        f"{NOT_WAITED}|while in use",
    ),
    ("softmax", "sm_80", "unmasked load", edit(r"@%p\d+ (ld\.global)", r"\1", -1), OUTSIDE),
    (
        "softmax",
        "sm_90",
        "no barrier in the reduction",
        edit(r"bar\.sync\s+0;", ""),
        f"{RACE}|uninit",
    ),
    ("dropout", "sm_120", "unmasked store", edit(r"@%p\d+ (st\.global)", r"\1", -1), OUTSIDE),
]


@pytest.mark.parametrize(
    "kernel, arch, name, mutate, report", TRITON, ids=[f"{k} {a}: {n}" for k, a, n, _, _ in TRITON]
)
def test_fault_in_triton_kernel_is_reported(
    kernel: str, arch: str, name: str, mutate: Mutation, report: str, rng: np.random.Generator
) -> None:
    with pytest.raises(PtxError, match=report) as caught:
        TRITON_CASES[kernel](arch, rng, mutate)
    assert_located(caught.value, caught.value.kernel, False)
    assert caught.value.kernel.startswith(kernel.replace("aligned", "matmul"))
