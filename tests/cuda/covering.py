"""Covering arrays: few rows that show every pair of values of any two factors together."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def product(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool], part: str = "1/1"
) -> list[Row]:
    """Every allowed row of the whole product, or of its `part` "i/n", 1 ≤ i ≤ n.

    The n parts are disjoint and make up the product. Rows come in a shuffled order, the same on
    every call, so that any part is a fair sample of the whole.
    """
    which, parts = (int(word) for word in part.split("/"))
    if not 1 <= which <= parts:
        raise ValueError(f"--exhaustive={part}: expected I/N with 1 ≤ I ≤ N")
    order = list(range(math.prod(len(values) for values in factors.values())))
    random.Random(0).shuffle(order)
    rows = (_row(factors, index) for index in order[which - 1 :: parts])
    return [row for row in rows if allowed(row)]


def _row(factors: Mapping[str, Sequence[Any]], index: int) -> Row:
    """Row `index` of the product, the first factor being the lowest digit."""
    row = {}
    for name, values in factors.items():
        index, digit = divmod(index, len(values))
        row[name] = values[digit]
    return row


def pairwise(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]) -> list[Row]:
    """Allowed rows that cover every allowed pair; the same on every call.

    Greedy: each row starts from an uncovered pair and takes, of many random allowed completions,
    the one that covers most.
    """
    draw = random.Random(0)
    names = list(factors)
    left = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    }
    rows: list[Row] = []
    while left:
        (a, x), (b, y) = min(left, key=str)
        best: Row | None = None
        most = 0
        for _ in range(400):
            row = {name: draw.choice(factors[name]) for name in names}
            row[a], row[b] = x, y
            if not allowed(row):
                continue
            new = len(_pairs(row, names) & left)
            if new > most:
                best, most = row, new
        if best is None:  # no completion of this pair is allowed
            left.discard(((a, x), (b, y)))
            continue
        rows.append(best)
        left -= _pairs(best, names)
    return rows


def _pairs(row: Row, names: Sequence[str]) -> set[Any]:
    return set(itertools.combinations([(name, row[name]) for name in names], 2))
