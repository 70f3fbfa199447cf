"""Every Triton that users have: what it makes of the kernels passes the gates of `survey.py`."""

from __future__ import annotations

import pytest

from . import survey, versions
from .conftest import CHOSEN

pytestmark = pytest.mark.skipif(CHOSEN == "interpret", reason="the interpreter compiles nothing")

LOOP = """
$L__BB0_1:
    ld.global.b32 %r9, [%rd1];
$L__BB0_2:
    {load}
    {copy}
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{...}};
    @%p1 bra $L__BB0_2;
    ld.global.b16 %rs1, [%rd1];
    @%p2 bra $L__BB0_1;
    ld.global.b16 %rs1, [%rd1];
$L__BB0_3:
    ld.global.b16 %rs1, [%rd1];
    @%p1 bra $L__BB0_3;
"""
COPY = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;"
TMA = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [%rd1, {%r2, %r3}], [%r4];"


@pytest.mark.parametrize(
    ("load", "copy", "expected"),
    [
        ("@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", COPY, (1, 1, 1)),
        ("ld.global.L1::evict_last.u8 %rs1, [%rd1];", TMA, (1, 1, 1)),
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", COPY, (0, 1, 1)),
        ("ld.global.v2.b16 {%rs1, %rs2}, [%rd1];", "", (0, 1, 0)),
        ("ld.shared.b16 %rs1, [%r1];", "", (0, 0, 0)),
    ],
)
def test_a_main_loop_is_read(load: str, copy: str, expected: tuple[int, int, int]) -> None:
    (loop,) = survey.main_loops(LOOP.format(load=load, copy=copy))
    assert (loop["narrow"], loop["loads"], loop["copies"]) == expected


def test_a_loop_that_multiplies_may_be_fed_by_another() -> None:
    copying = f"$L__BB0_1:\n {TMA}\n @%p1 bra $L__BB0_1;\n"
    multiplying = "$L__BB0_2:\n {} tcgen05.mma.cta_group::1 [%r1];\n @%p1 bra $L__BB0_2;\n"
    for load, copies in (("", 1), ("ld.global.b32 %r1, [%rd1];", 0)):
        (loop,) = survey.main_loops(copying + multiplying.format(load))
        assert loop["copies"] == copies


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"stack": 8}, "8 bytes of stack"),
        ({"loops": [{"narrow": 2, "loads": 2, "copies": 1}]}, "2 loads of 8 or 16 bits"),
        ({"loops": [{"narrow": 0, "loads": 2, "copies": 0}]}, "without cp.async or TMA"),
    ],
)
def test_each_gate_can_fail(change: dict, fault: str | None) -> None:
    good = {
        "triton": "3.9.0", "arch": 80, "kernel": "gemm", "registers": 128, "stack": 0,
        "shared": 0, "loops": [{"narrow": 0, "loads": 1, "copies": 8}], "cases": ["a case"],
    }  # fmt: skip
    row = survey.Row(**(good | change))
    assert [fault in found for found in row.faults()] == ([True] if fault else [])
    result = {
        "triton": "3.9.0", "rows": [vars(row) | {"faults": row.faults()}],
        "binaries": {"80": {"shrink, tail": 3, "gemm, tail": 3}},
    }  # fmt: skip
    lines = versions.faults(result)
    assert len(lines) == (2 if fault else 1) and "3 binaries" in lines[-1]


def test_the_thinned_survey_meets_every_use_rows_and_rank_class() -> None:
    thin, whole = (survey.cases(90, whole=w) for w in (False, True))
    assert set(thin) < set(whole)
    assert {c.use for c in thin} == set(survey.USES) and {c.dtype for c in thin} == {*survey.DTYPES}
    assert len(whole) == 10 * 3 * len(survey.ROWS) * len(survey.RANKS)


@pytest.mark.versions
@pytest.mark.parametrize("version", versions.VERSIONS)
def test_every_gate_holds(version: str) -> None:
    assert versions.faults(versions.survey(version)) == []
