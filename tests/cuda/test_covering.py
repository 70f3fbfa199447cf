"""The choice of cases: combinations are all there, and the parts of the product make it up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from . import test_kernels, test_persistent
from .covering import Row, covering, product

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


@pytest.mark.parametrize("strength", [2, 3])
@pytest.mark.parametrize("name", [*test_kernels.ROWS, "fused_row"])
def test_the_kernels_cases_are_covered(name: str, strength: int) -> None:
    """A combination is missing only if it is itself what no case may have."""
    factors = {**test_kernels.ROWS, "fused_row": test_persistent.FUSED_FACTORS}[name]
    rows = covering(factors, test_kernels.allowed, strength)
    there = combinations(rows, strength)
    harmless = {"strategy": "delta", "dropout": 0.0, "r": 1}
    for names in itertools.combinations(factors, strength):
        for values in itertools.product(*(factors[n] for n in names)):
            some = tuple(zip(names, values))
            assert some in there or not test_kernels.allowed({**harmless, **dict(some)})
