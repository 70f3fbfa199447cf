"""What can be said from samples: the median, their spread, and how certain a ratio is."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

DRAWS = 2000
NOISY = 0.10  # if a ratio spreads further, something else used the machine


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds."""

    median: float
    spread: float
    least: float
    rounds: int
    samples: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        return cls(
            median=statistics.median(samples),
            spread=spread_of(samples),
            least=min(samples),
            rounds=len(samples),
            samples=tuple(samples),
        )


def spread_of(samples: Sequence[float]) -> float:
    """The distance between the quartiles, over the median. It is 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def ratio_spread(over: Sequence[float], under: Sequence[float]) -> float:
    """The spread of a ratio of two lists of samples.

    Lists of one length were measured in turn, so there is one ratio for each round: a machine that
    slows both does not count. Otherwise each sample of one list is divided by each of the other.
    """
    if len(over) == len(under):
        return spread_of([a / b for a, b in zip(over, under)])
    return spread_of([a / b for a in over for b in under])


def ratio_interval(pairs: Sequence[tuple[float, float]], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of the medians, first over second.

    Whole pairs are drawn. The two times of a pair were measured one after the other, so a
    disturbance of the machine affected both.
    """
    draw = random.Random(seed)
    ratios = []
    for _ in range(DRAWS):
        first, second = zip(*draw.choices(pairs, k=len(pairs)))
        ratios.append(statistics.median(first) / statistics.median(second))
    ratios.sort()
    cut = DRAWS // 40
    return ratios[cut], ratios[-cut - 1]


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that exist, or None if there is none."""
    found = [v for v in values if v is not None]
    return statistics.geometric_mean(found) if found else None
