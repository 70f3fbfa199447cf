"""The choice of cases: every pair is there, and the parts of the product make it up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from .covering import Row, pairwise, product

FACTORS: dict[str, list[Any]] = {"a": [1, 2, 3], "b": ["x", "y"], "c": [0.0, 0.5, 1.0, 2.0]}


def allowed(row: Row) -> bool:
    return not (row["a"] == 1 and row["b"] == "y")


def keys(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in FACTORS) for row in rows]


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


def test_every_allowed_pair_is_covered() -> None:
    pairs = {
        pair for row in product(FACTORS, allowed) for pair in itertools.combinations(row.items(), 2)
    }
    rows = pairwise(FACTORS, allowed)
    assert all(allowed(row) for row in rows)
    assert {pair for row in rows for pair in itertools.combinations(row.items(), 2)} == pairs
    assert len(rows) < len(product(FACTORS, allowed))
