"""The choice of cases: combinations are all there, and the parts of the product make it up."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from alora_kernels.backends.cuda import CudaBackend
from alora_kernels.backends.programs import Program, Run

from . import test_kernels, test_persistent
from .cases import Case, inputs
from .covering import Row, covering, product
from .ptx_sender import CSRC, compiled, step_by_step

FACTORS: dict[str, list[Any]] = {
    "a": [1, 2, 3],
    "b": ["x", "y"],
    "c": [0.0, 0.5, 1.0, 2.0],
    "d": [False, True],
    "e": [4, 5, 6],
}


def allowed(row: Row) -> bool:
    return not (row["a"] == 1 and row["b"] == "y")


def keys(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in FACTORS) for row in rows]


def combinations(rows: list[Row], strength: int) -> set[Any]:
    return {some for row in rows for some in itertools.combinations(row.items(), strength)}


def test_the_product_has_every_allowed_row_once() -> None:
    every = [k for k in itertools.product(*FACTORS.values()) if k[:2] != (1, "y")]
    assert sorted(keys(product(FACTORS, allowed))) == sorted(every)


@pytest.mark.parametrize("parts", [2, 5, 40])
def test_parts_are_disjoint_and_complete(parts: int) -> None:
    split = [keys(product(FACTORS, allowed, f"{i + 1}/{parts}")) for i in range(parts)]
    assert sorted(itertools.chain(*split)) == sorted(keys(product(FACTORS, allowed)))


@pytest.mark.parametrize("part", ["0/3", "4/3"])
def test_a_part_that_does_not_exist_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match=f"--exhaustive={part}: expected I/N"):
        product(FACTORS, allowed, part)


@pytest.mark.parametrize("strength", [1, 2, 3, 4, 5])
def test_every_allowed_combination_is_covered(strength: int) -> None:
    every, rows = product(FACTORS, allowed), covering(FACTORS, allowed, strength)
    assert all(allowed(row) for row in rows)
    assert combinations(rows, strength) == combinations(every, strength)
    assert len(rows) < len(every) or strength == len(FACTORS)


ROWS = {**test_kernels.ROWS, "fused_row": test_persistent.FUSED_FACTORS}
HOPPER_TAIL = {"strategy": "tail", "arch": "sm_90a"}
FIXED: dict[str, dict[str, Any]] = {  # what the tests of these rows say themselves
    "row": {},
    "sm90_row": HOPPER_TAIL,
    "onepass_sm90_row": {"strategy": "onepass", "arch": "sm_90a"},
    "decode_row": {"strategy": "onepass"},
    "fused_row": {**HOPPER_TAIL, "n": 264},
}


@pytest.mark.parametrize("strength", [2, 3])
@pytest.mark.parametrize("name", ROWS)
def test_the_kernels_cases_are_covered(name: str, strength: int) -> None:
    """A combination is missing only if it is itself what no case may have."""
    factors = ROWS[name]
    rows = covering(factors, test_kernels.allowed, strength)
    there = combinations(rows, strength)
    harmless = {"strategy": "delta", "dropout": 0.0, "r": 1}
    for names in itertools.combinations(factors, strength):
        for values in itertools.product(*(factors[n] for n in names)):
            some = tuple(zip(names, values))
            assert some in there or not test_kernels.allowed({**harmless, **dict(some)})


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_cases_of_ci_launch_every_kernel(arch: str, seed: int) -> None:
    sources = [s for s in CSRC.glob("*.cu") if arch == "sm_90a" or "sm90" not in s.stem]
    texts = [compiled(s.name, arch, "ptx").read_text() for s in sources]
    every = {name for text in texts for name in re.findall(r"\.entry (\w+)", text)}
    launched = {name for name in every if "vector_32" in name}  # test_shrink_of_many_active_rows
    for name, factors in ROWS.items():
        for row in covering(factors, test_kernels.allowed, test_kernels.STRENGTH.get(name, 2)):
            case = Case(**FIXED[name], **row)
            if case.arch != arch:
                continue

            def make_ready(program: Program) -> Run:
                launched.update(launch.plan.kernel for launch in program.launches)
                return lambda tensors: step_by_step(program, tensors, lambda *sent: None)

            backend = CudaBackend(make_ready, (case.machine, int(arch[3:5])))
            asked, save = inputs(case, seed), name != "decode_row"
            given = asked.call, case.strategy, asked.x, asked.projections
            _, xa = backend.forward(*given, None, save)
            if save:
                backend.backward(*given, xa, asked.dys, asked.needs)
    assert launched == every
