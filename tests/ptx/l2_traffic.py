"""What a GEMM loads, without execution: its tile order replayed through a cache as large as the L2.

test_counters.py holds these loads against those of executed kernels.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program's tile of the output, and how many tile rows a group of programs shares."""

    m: int = 128
    n: int = 256
    k: int = 64
    group: int = 8


@dataclasses.dataclass
class Traffic:
    """Bytes that programs ask of the L2, and that the L2 asks of DRAM."""

    l2: int = 0
    dram: int = 0


def tile_order(tiles_m: int, tiles_n: int, group: int) -> Iterator[tuple[int, int]]:
    """Output tiles in launch order: column by column inside a group of tile rows."""
    for first in range(0, tiles_m, group):
        rows = range(first, min(first + group, tiles_m))
        for column, row in itertools.product(range(tiles_n), rows):
            yield row, column


def replay(m: int, n: int, k: int, tile: Tile, l2: int, processors: int, size: int = 2) -> Traffic:
    """Operand loads of a GEMM [m, k] · [k, n]: `processors` programs run in step over k.

    The cache holds pieces of [tile.m, tile.k] and [tile.k, tile.n], least recently used out first.
    Rows beyond m or n and columns beyond k are not loaded.
    """
    tiles_m, tiles_n, steps = math.ceil(m / tile.m), math.ceil(n / tile.n), math.ceil(k / tile.k)
    order = list(tile_order(tiles_m, tiles_n, tile.group))
    cache: collections.OrderedDict[tuple[str, int, int], int] = collections.OrderedDict()
    held, out = 0, Traffic()
    for first in range(0, len(order), processors):
        wave = order[first : first + processors]
        for step in range(steps):
            depth = min(tile.k, k - step * tile.k)
            for row, column in wave:
                for key, width in (
                    (("left", row, step), min(tile.m, m - row * tile.m)),
                    (("right", column, step), min(tile.n, n - column * tile.n)),
                ):
                    amount = width * depth * size
                    out.l2 += amount
                    if key in cache:
                        cache.move_to_end(key)
                        continue
                    out.dram += amount
                    cache[key] = amount
                    held += amount
                    while held > l2:
                        held -= cache.popitem(last=False)[1]
    return out
