"""What every launched kernel moved and computed, as a table and a csv.

`pytest tests/ptx --ptx-report` prints the table; `--ptx-report=FILE.csv` or the environment
variable ALORA_PTX_REPORT=FILE.csv writes the csv (the variable also for `pytest tests`).
"""

from __future__ import annotations

import collections
import csv
import os
import re
from pathlib import Path
from typing import Any

from .machine import Machine

COLUMNS = [
    "test", "kernel", "arch", "grid", "threads", "load_bytes", "load_sectors", "load_efficiency",
    "store_bytes", "store_sectors", "store_efficiency", "wavefronts", "ideal_wavefronts",
    "conflicts", "mma_flops", "barriers", "atomics", "instructions",
]  # fmt: skip
Row = dict[str, Any]


def efficiency(machine: Machine, kinds: set[str]) -> float:
    """Bytes that the accesses of the last launch needed over the sectors they moved."""
    counters = machine.reports[-1]
    lines = {i.line: i.op for i in counters.kernel.code}
    traffic = [t for line, t in counters.by_line.items() if lines[line][0] in kinds and t.sectors]
    sectors = sum(t.sectors for t in traffic)
    return sum(t.least for t in traffic) / sectors if sectors else 1.0


def row(machine: Machine, test: str = "") -> Row:
    """The last launch of `machine` as one row."""
    counters, count = machine.reports[-1], machine.last
    target = re.search(r"\.target\s+(\w+)", counters.text)
    waves, ideal = count["smem_wavefronts"], count["smem_ideal"]
    return {
        "test": test,
        "kernel": counters.kernel.name,
        "arch": target[1] if target else "",
        "grid": "x".join(map(str, counters.grid)),
        "threads": counters.threads,
        "load_bytes": count["gl_ld_bytes"],
        "load_sectors": count["gl_ld_sectors"],
        "load_efficiency": round(efficiency(machine, {"ld", "ldu", "cp"}), 4),
        "store_bytes": count["gl_st_bytes"],
        "store_sectors": count["gl_st_sectors"],
        "store_efficiency": round(efficiency(machine, {"st"}), 4),
        "wavefronts": waves,
        "ideal_wavefronts": ideal,
        "conflicts": waves - ideal,
        "mma_flops": count["mma_flops"],
        "barriers": count["barriers"],
        "atomics": count["atomics"],
        "instructions": " ".join(f"{k}:{v}" for k, v in sorted(counters.instructions().items())),
    }


class Report:
    """Collects one row a launch while a test session runs."""

    def __init__(self, path: str) -> None:
        self.path, self.rows = path, []  # type: str, list[Row]
        Machine.on_launch = self.add

    def add(self, machine: Machine) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0].rpartition("::")[2]
        self.rows.append(row(machine, test))

    def write(self) -> str:
        """Write the csv, and return the table: one line a kernel, arch and grid."""
        if self.path:
            with Path(self.path).open("w", newline="") as f:
                writer = csv.DictWriter(f, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)
        seen: dict[tuple[str, str, str], Row] = {}
        times: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for r in self.rows:
            key = r["kernel"], r["arch"], r["grid"]
            seen.setdefault(key, r)
            times[key] += 1
        head = f"{'kernel':<34}{'arch':<9}{'grid':<10}{'runs':>5}{'load B':>12}{'eff':>6}"
        head += (
            f"{'store B':>11}{'eff':>6}{'waves':>9}{'conflicts':>10}{'mma FLOPs':>14}{'bars':>6}"
        )
        lines = [head]
        for key, r in sorted(seen.items()):
            lines.append(
                f"{r['kernel'][:33]:<34}{r['arch']:<9}{r['grid']:<10}{times[key]:>5}"
                f"{r['load_bytes']:>12}{r['load_efficiency']:>6.2f}{r['store_bytes']:>11}"
                f"{r['store_efficiency']:>6.2f}{r['wavefronts']:>9}{r['conflicts']:>10}"
                f"{r['mma_flops']:>14}{r['barriers']:>6}"
            )
        return "\n".join(lines)
