"""A roofline *estimate* of the forward pass per GPU from data-sheet rates: nothing is measured.

    python bench/model.py [--gpu H100] [--rows 16 256 8192] [--k 4096] [--n 4096] [--r 32] [--csv F]

Time = max(tensor FLOPs / peak, DRAM bytes / bandwidth), summed over launches that depend on each
other. DRAM bytes come from replaying the GEMM's tile order through an LRU cache of the GPU's L2
size, without execution; tests/ptx/test_counters.py holds the replay's loads against executed
kernels. Launch costs, clocks under load, and any inefficiency of a kernel are left out: the ratio
of two strategies means more than either time.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Data-sheet figures: dense bf16 tensor FLOP/s, DRAM bytes/s, L2 bytes, SMs."""

    name: str
    flops: float
    bandwidth: float
    l2: int
    processors: int


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, B200 (per GPU of HGX B200). Dense, no sparsity.
GPUS = {
    "A100": Gpu("A100", 312e12, 2.039e12, 40 << 20, 108),
    "H100": Gpu("H100", 989.4e12, 3.35e12, 50 << 20, 132),
    "B200": Gpu("B200", 2250e12, 8.0e12, 126 << 20, 148),
}


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program's tile of the output, and how many tile rows a group of programs shares."""

    m: int = 128
    n: int = 256
    k: int = 64
    group: int = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows, in_features, out_features, rank, active fraction; `size` bytes an element."""

    m: int
    k: int
    n: int
    r: int
    f: float
    size: int = 2


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


@functools.lru_cache(64)
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


@dataclasses.dataclass(frozen=True)
class Step:
    """One launch: its tensor FLOPs and DRAM bytes."""

    what: str
    flops: float
    bytes: float

    def seconds(self, gpu: Gpu) -> float:
        return max(self.flops / gpu.flops, self.bytes / gpu.bandwidth)


def steps(strategy: str, s: Shape, gpu: Gpu, tile: Tile) -> list[Step]:
    """The launches of `base`, `delta`, `tail` or `onepass`, active rows being one suffix."""
    tile = dataclasses.replace(tile, m=min(tile.m, 16 * math.ceil(s.m / 16)))
    operands = replay(s.m, s.n, s.k, tile, gpu.l2, gpu.processors, s.size).dram
    active = math.ceil(s.f * s.m)
    # The tensor cores multiply whole tiles of rows, and ranks in steps of 16.
    busy, rank = tile.m * math.ceil(active / tile.m), 16 * math.ceil(s.r / 16)
    write, flops = s.size * s.m * s.n, 2.0 * s.m * s.n * s.k
    adapter = s.size * s.r * (s.k + s.n)
    base = Step("gemm", flops, operands + write)
    shrink = Step("shrink", 2.0 * active * s.k * rank, s.size * (active * (s.k + s.r) + s.r * s.k))
    low = s.size * active * s.r
    if strategy == "base":
        return [base]
    if strategy == "delta":
        expand = s.size * (2 * active * s.n + active * s.r + s.r * s.n)
        return [base, shrink, Step("expand", 2.0 * active * s.n * rank, expand)]
    if strategy == "tail":
        fused = Step("gemm+tail", flops + 2.0 * busy * s.n * rank,
                     operands + write + low + s.size * s.r * s.n)  # fmt: skip
        return [shrink, fused]
    if strategy == "onepass":
        again = math.ceil(s.n / tile.n)  # every tile column computes x · lora_aᵀ for itself
        extra = 2.0 * busy * s.k * rank * again + 2.0 * busy * s.n * rank
        return [Step("onepass", flops + extra, operands + write + adapter)]
    raise ValueError(f"strategy {strategy!r}: expected base, delta, tail or onepass")


def estimate(strategy: str, s: Shape, gpu: Gpu, tile: Tile | None = None) -> float:
    """Estimated seconds of a forward pass."""
    return sum(step.seconds(gpu) for step in steps(strategy, s, gpu, tile or Tile()))


def table(gpus: Sequence[Gpu], shapes: Sequence[Shape]) -> list[dict[str, object]]:
    """One row for each GPU, shape and strategy."""
    rows: list[dict[str, object]] = []
    for gpu, s in itertools.product(gpus, shapes):
        base = estimate("base", s, gpu)
        for strategy in ("delta", "tail", "onepass"):
            launches = steps(strategy, s, gpu, Tile())
            seconds = estimate(strategy, s, gpu)
            rows.append({
                "gpu": gpu.name, "M": s.m, "K": s.k, "N": s.n, "R": s.r, "f": s.f,
                "strategy": strategy, "launches": len(launches),
                "tensor_flops": int(sum(x.flops for x in launches)),
                "dram_bytes": int(sum(x.bytes for x in launches)),
                "estimate_us": round(1e6 * seconds, 2), "times_base": round(seconds / base, 4),
            })  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 256, 8192], help="M")
    parser.add_argument("--active", nargs="+", type=float, default=[0.1, 1.0], help="f")
    for name, default in (("k", 4096), ("n", 4096), ("r", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--csv", help="write the rows there too")
    a = parser.parse_args(arguments)
    shapes = [Shape(m, a.k, a.n, a.r, f) for m, f in itertools.product(a.rows, a.active)]
    rows = table([GPUS[g] for g in a.gpu], shapes)
    print("ESTIMATE: roofline from data-sheet rates, bf16, forward; nothing was measured.")
    print(
        f"{'GPU':<6}{'M':>6}{'f':>6}  {'strategy':<9}{'GFLOP':>10}{'DRAM MB':>10}"
        f"{'µs':>10}{'× base':>8}"
    )
    for r in rows:
        print(
            f"{r['gpu']:<6}{r['M']:>6}{r['f']:>6}  {r['strategy']:<9}"
            f"{r['tensor_flops'] / 1e9:>10.2f}{r['dram_bytes'] / 1e6:>10.1f}"  # type: ignore[operator]
            f"{r['estimate_us']:>10}{r['times_base']:>8.3f}"
        )
    if a.csv:
        with open(a.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
