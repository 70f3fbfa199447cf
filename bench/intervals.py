"""How sure a ratio of medians is."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

DRAWS = 2000


def ratio_interval(pairs: Sequence[tuple[float, float]], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of the medians, first over second.

    Pairs are drawn whole: the two of a pair were measured one after the other, so what the machine
    did meanwhile weighs on both.
    """
    draw = random.Random(seed)
    ratios = []
    for _ in range(DRAWS):
        first, second = zip(*draw.choices(pairs, k=len(pairs)))
        ratios.append(statistics.median(first) / statistics.median(second))
    ratios.sort()
    cut = DRAWS // 40
    return ratios[cut], ratios[-cut - 1]
