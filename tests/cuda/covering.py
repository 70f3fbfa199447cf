"""Covering arrays: few rows that show every pair, triple, ... of values of different factors."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

Row = dict[str, Any]
Factors = Mapping[str, Sequence[Any]]
Allowed = Callable[[Row], bool]
CANDIDATES = 100  # random rows of which the one that covers most is taken


def chosen(
    config: pytest.Config, factors: Factors, allowed: Allowed, strength: int = 2
) -> list[Row]:
    """The rows that `--exhaustive` or `--strength` ask for, of `strength` at least."""
    part, strength = config.getoption("--exhaustive"), max(config.getoption("--strength"), strength)
    return product(factors, allowed, part) if part else covering(factors, allowed, strength)


def product(factors: Factors, allowed: Allowed, part: str = "1/1") -> list[Row]:
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


def _row(factors: Factors, index: int) -> Row:
    """Row `index` of the product, the first factor being the lowest digit."""
    row = {}
    for name, values in factors.items():
        index, digit = divmod(index, len(values))
        row[name] = values[digit]
    return row


def covering(factors: Factors, allowed: Allowed, strength: int) -> list[Row]:
    """Allowed rows in which any values of any `strength` factors meet, if an allowed row has them.

    The same on every call. Greedy: each row is the one that covers most among random allowed rows
    with the first combination that is not covered yet.
    """
    draw = np.random.default_rng(0)
    values = list(factors.values())
    levels = np.array([len(v) for v in values])
    groups = np.array(list(itertools.combinations(range(len(values)), strength)))
    # A combination's number: its digits, those of the group's last factor lowest, from the
    # group's first number on.
    scales = np.cumprod(np.c_[np.ones(len(groups), int), levels[groups][:, :0:-1]], axis=1)[:, ::-1]
    begins = np.r_[0, np.cumsum(levels[groups].prod(axis=1))]
    left = np.ones(begins[-1], bool)
    rows: list[Row] = []
    first = 0
    while first < len(left):
        if not left[first]:
            first += 1
            continue
        group = int(np.searchsorted(begins, first, side="right")) - 1
        drawn = draw.integers(levels, size=(CANDIDATES, len(values)))
        drawn[:, groups[group]] = (first - begins[group]) // scales[group] % levels[groups[group]]
        named = [{n: v[d] for n, v, d in zip(factors, values, digits)} for digits in drawn]
        numbers = begins[:-1] + (drawn[:, groups] * scales).sum(axis=2)
        news = [left[i].sum() if allowed(row) else 0 for row, i in zip(named, numbers)]
        best = int(np.argmax(news))
        if news[best]:
            rows.append(named[best])
            left[numbers[best]] = False
        left[first] = False  # covered, or in no row that is allowed
    return rows
