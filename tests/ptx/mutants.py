"""Seeded faults: one thing deleted or altered in a correct kernel, and the report it must cause."""

from __future__ import annotations

import dataclasses

RACE = "race"
DEADLOCK = "deadlock"
OUTSIDE = "outside every allocation"
NOT_WAITED = "has not been waited for"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `kernel`'s text; `report` is a pattern of the fault."""

    kernel: str
    name: str
    old: str
    new: str
    report: str
    addressed: bool = True  # the report names an address


def _without(kernel: str, name: str, old: str, report: str, addressed: bool = True) -> Mutant:
    return Mutant(kernel, name, old, "", report, addressed)


def _asm(text: str, guard: str = "") -> str:
    return f'{guard}asm volatile("{text}" ::: "memory");'


_SYNC = "\n  __syncthreads();"
_PROXY_FENCE = _asm("fence.proxy.async.shared::cta;")


_EMPTY_WAIT = "if (s >= 2) barrier_wait(&empty[s % 2], (s / 2 - 1) & 1);"
_CLUSTER = """
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");"""

CUDA = [
    # memcheck
    Mutant("axpy", "no mask", "if (i < n) out[i] = a", "out[i] = a", OUTSIDE),
    Mutant("axpy", "off by one", "a * x[i]", "a * x[i + 1]", OUTSIDE),
    Mutant(
        "axpy",
        "misaligned",
        "if (i < n) out[i]",
        "if (i < n - 1) *(float*)((char*)(out + i) + 2)",
        "misaligned 4-byte",
    ),
    Mutant(
        "transpose",
        "half a mask",
        "r2 + i < cols && c2 < rows",
        "c2 < rows",
        f"{OUTSIDE}|uninitialised shared",
    ),
    Mutant(
        "block_sum",
        "shared off by one",
        "part[t + half]",
        "part[t + half + 1]",
        "out of bounds shared|race",
    ),
    Mutant("ring_sum", "one step too many", "if (s < steps)", "if (s <= steps)", OUTSIDE),
    # initcheck
    Mutant(
        "block_sum",
        "a word never written",
        "part[t] = x",
        "if (t < 255) part[t] = x",
        "uninitialised shared",
    ),
    # racecheck, barriers
    _without("block_sum", "no barrier after the fill", _SYNC, RACE),
    Mutant(
        "block_sum",
        "no barrier in the loop",
        "part[t + half];\n    __syncthreads();",
        "part[t + half];",
        RACE,
    ),
    Mutant(
        "block_sum",
        "barrier in a branch",
        "if (t < half) part[t] += part[t + half];\n    __syncthreads();",
        "if (t < half) { part[t] += part[t + half]; __syncthreads(); }",
        "part of a warp|race",
        False,
    ),
    _without("transpose", "no barrier", _SYNC, f"{RACE}|uninitialised shared"),
    _without("warp_rotate", "no warp barrier", "__syncwarp();", "race within a warp"),
    Mutant(
        "named_barriers",
        "writer does not wait",
        _asm("bar.sync 2, 64;"),
        _asm("bar.arrive 2, 64;"),
        f"{RACE}|arrived",
        False,
    ),
    Mutant(
        "named_barriers",
        "wrong count",
        "bar.arrive 1, 64",
        "bar.arrive 1, 96",
        "threads expected",
        False,
    ),
    Mutant(
        "named_barriers",
        "wrong barrier",
        "bar.sync 1, 64",
        "bar.sync 3, 64",
        f"{DEADLOCK}|arrived|{RACE}",
        False,
    ),
    Mutant(
        "named_barriers",
        "arrives before it writes",
        'buffer[lane] = x[s * 32 + lane];\n      asm volatile("bar.arrive 1, 64;" ::: "memory");',
        'asm volatile("bar.arrive 1, 64;" ::: "memory");\n      buffer[lane] = x[s * 32 + lane];',
        f"{RACE}|uninitialised shared",
    ),
    # cp.async
    Mutant("ring_sum", "waits for too few groups", "wait_group 1", "wait_group 2", NOT_WAITED),
    _without("ring_sum", "no barrier", "\n    __syncthreads();", f"{RACE}|{NOT_WAITED}"),
    Mutant(
        "ring_sum",
        "stage index",
        "&ring[s % 3][t]",
        "&ring[s % 2][t]",
        f"{RACE}|uninitialised|{NOT_WAITED}",
    ),
    _without("ring_sum", "no commit", 'asm volatile("cp.async.commit_group;");', NOT_WAITED),
    # between blocks
    _without("last_block_sum", "no fence before the count", "__threadfence();", "global race"),
    Mutant(
        "last_block_sum",
        "no barrier before the count",
        "__threadfence();\n  __syncthreads();",
        "__threadfence();",
        "global race",
    ),
    Mutant(
        "last_block_sum",
        "no fence after the count",
        "if (!last) return;\n  __threadfence();",
        "if (!last) return;",
        "global race",
    ),
    Mutant(
        "last_block_sum",
        "count without an atomic",
        "atomicAdd(count, 1)",
        "(*count)++",
        "global race",
    ),
    Mutant(
        "chained_sum", "relaxed read of the flag", "ld.acquire.gpu", "ld.relaxed.gpu", "global race"
    ),
    Mutant(
        "chained_sum",
        "relaxed write of the flag",
        "st.release.gpu",
        "st.relaxed.gpu",
        "global race",
    ),
    Mutant(
        "chained_sum",
        "flag before the data",
        "x[b * 64 + t];\n  __syncthreads();",
        "x[b * 64 + t];",
        "global race",
    ),
    Mutant(
        "chained_sum",
        "flag never set",
        'if (t == 0)\n    asm volatile("st',
        'if (t == 64)\n    asm volatile("st',
        DEADLOCK,
        False,
    ),
    # mbarriers and bulk copies
    _without(
        "bulk_pipeline", "full not waited for", "barrier_wait(&full[s % 2], s / 2 & 1);", NOT_WAITED
    ),
    _without(
        "bulk_pipeline",
        "buffer reused before its readers arrived",
        _EMPTY_WAIT,
        f"{RACE}|over-arrived",
    ),
    Mutant(
        "bulk_pipeline",
        "wrong parity",
        "&full[s % 2], s / 2 & 1",
        "&full[s % 2], (s / 2 + 1) & 1",
        f"{NOT_WAITED}|uninitialised|{RACE}",
    ),
    Mutant(
        "bulk_pipeline",
        "parity never flips",
        "&full[s % 2], s / 2 & 1",
        "&full[s % 2], 0",
        f"waited for twice|{NOT_WAITED}",
    ),
    Mutant(
        "bulk_pipeline",
        "too few bytes expected",
        "&full[s % 2], 2048",
        "&full[s % 2], 1024",
        DEADLOCK,
        False,
    ),
    _without(
        "bulk_pipeline", "readers never arrive", "barrier_arrive(&empty[s % 2]);", DEADLOCK, False
    ),
    Mutant(
        "bulk_pipeline",
        "too few arrivals expected",
        "&empty[i], 128",
        "&empty[i], 64",
        "over-arrived|race",
    ),
    _without("bulk_pipeline", "no proxy fence", _PROXY_FENCE, "no proxy fence"),
    _without(
        "bulk_pipeline",
        "no barrier before the store",
        _asm("bar.sync 2, 128;"),
        f"{RACE}|uninitialised|proxy fence",
    ),
    _without(
        "bulk_pipeline",
        "store still reads",
        _asm("cp.async.bulk.wait_group.read 0;", "if (t == 0) "),
        "not ordered after an access by the bulk store",
    ),
    _without(
        "bulk_pipeline",
        "store not committed",
        _asm("cp.async.bulk.commit_group;"),
        "never committed|bulk store",
        False,
    ),
    Mutant(
        "bulk_pipeline",
        "odd size",
        '"l"(x + s * 512), "r"(2048)',
        '"l"(x + s * 512), "r"(2040)',
        "no multiple of 16",
        False,
    ),
    Mutant(
        "bulk_pipeline",
        "odd source",
        '"l"(x + s * 512)',
        '"l"(x + s * 512 + 1)',
        "misaligned 16-byte",
    ),
    Mutant(
        "bulk_pipeline",
        "barriers used before they are initialised",
        "barrier_init(&empty[i], 128);\n  __syncthreads();",
        "barrier_init(&empty[i], 128);",
        "after its initialisation|no mbarrier was initialised",
    ),
    _without(
        "bulk_pipeline",
        "exit with a store in flight",
        _asm("cp.async.bulk.wait_group 0;", "if (t == 0) "),
        "block exits",
        False,
    ),
    # wgmma
    _without("wgmma_tile", "no proxy fence", _PROXY_FENCE, "no proxy fence"),
    Mutant(
        "wgmma_tile",
        "no barrier",
        '"memory");\n  __syncthreads();',
        '"memory");',
        f"{RACE}|uninitialised",
    ),
    _without(
        "wgmma_tile", "no wgmma.fence", _asm("wgmma.fence.sync.aligned;"), "no wgmma.fence", False
    ),
    _without(
        "wgmma_tile", "no commit", _asm("wgmma.commit_group.sync.aligned;"), NOT_WAITED, False
    ),
    Mutant("wgmma_tile", "no wait", "wgmma.wait_group.sync.aligned 0;", "", NOT_WAITED, False),
    Mutant(
        "wgmma_tile",
        "descriptor out of bounds",
        "shared(sb[s])",
        "shared(sb[s]) + 1024",
        "past shared memory",
    ),
    # clusters
    Mutant(
        "cluster_swap",
        "read before the neighbour wrote",
        _CLUSTER + '\n  asm volatile("mapa',
        '\n  asm volatile("mapa',
        f"{RACE}|uninitialised",
    ),
    Mutant(
        "cluster_swap",
        "write before the neighbour read",
        _CLUSTER + "\n  mine[t] = v;",
        "\n  mine[t] = v;",
        RACE,
    ),
    Mutant(
        "cluster_swap",
        "no such rank",
        '"r"(rank ^ 1)',
        '"r"(rank + 1)',
        "beyond the cluster",
        False,
    ),
]
