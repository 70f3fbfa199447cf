"""What a kernel moved and computed: sectors, wavefronts, FLOPs, instructions by class."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from .parser import Instr, Kernel
from .registers import Mask

SECTOR = 32  # bytes
CLASSES = {
    "tensor": {"mma", "wgmma", "tcgen05"},
    "shared": {"ldmatrix", "stmatrix"},
    "sync": {"bar", "barrier", "mbarrier", "fence", "membar"},
    "atomic": {"atom", "red"},
    "copy": {"cp"},
    "branch": {"bra", "ret", "exit"},
    "shuffle": {"shfl", "vote", "redux", "match", "elect"},
}


def class_of(ins: Instr) -> str:
    """The instruction class that a report names."""
    op = ins.op
    if op[0] in ("ld", "st", "ldu"):
        kind = next((q for q in op if q.startswith(("shared", "param", "const"))), "global")
        return kind.partition("::")[0]
    return next((name for name, ops in CLASSES.items() if op[0] in ops), "arithmetic")


@dataclasses.dataclass
class Traffic:
    """Accesses of one instruction (by PTX line)."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    least: int = 0  # sectors that the bytes would fill
    wavefronts: int = 0
    ideal: int = 0


class Counters:
    """Counts of one launch; `total` is the machine's running sum."""

    def __init__(self, kernel: Kernel, total: collections.Counter[str]) -> None:
        self.kernel, self.total = kernel, total
        self.grid, self.threads, self.text = (1, 1, 1), 0, ""
        self.hits = np.zeros(len(kernel.code), np.int64)  # full-wave executions
        self.warps = np.zeros(len(kernel.code), np.int64)  # warps that executed it otherwise
        self.wave_warps = 0
        self.by_line: collections.defaultdict[int, Traffic] = collections.defaultdict(Traffic)

    def executed(self, pc: int, act: Mask) -> None:
        if act is None:
            self.hits[pc] += self.wave_warps
        else:
            self.hits[pc] += int(np.count_nonzero(act.reshape(-1, 32).any(1)))

    def instructions(self) -> dict[str, int]:
        """Warp-level instructions by class."""
        out: collections.Counter[str] = collections.Counter()
        for ins, hits in zip(self.kernel.code, self.hits.tolist()):
            out[class_of(ins)] += hits
        return dict(out)

    def _sectors(self, ins: Instr, addr: np.ndarray, lanes: np.ndarray, size: int) -> int:
        key = (lanes // 32 << 40) + (addr // SECTOR if size <= SECTOR else addr)
        key = np.sort(key)
        count = 1 + int(np.count_nonzero(key[1:] != key[:-1])) if len(key) else 0
        # Distinct bytes: lanes that share an address move it once.
        spot = np.sort((lanes // 32 << 40) + addr)
        distinct = 1 + int(np.count_nonzero(spot[1:] != spot[:-1])) if len(spot) else 0
        t = self.by_line[ins.line]
        t.requests += 1
        t.bytes += distinct * size
        t.sectors += count
        t.least += -(-distinct * size // SECTOR)
        return count

    def load(self, ins: Instr, addr: np.ndarray, lanes: np.ndarray, size: int) -> None:
        self.total["gl_ld_sectors"] += self._sectors(ins, addr, lanes, size)
        self.total["gl_ld_bytes"] += len(lanes) * size

    def store(self, ins: Instr, addr: np.ndarray, lanes: np.ndarray, size: int) -> None:
        self.total["gl_st_sectors"] += self._sectors(ins, addr, lanes, size)
        self.total["gl_st_bytes"] += len(lanes) * size

    def atomic(self, ins: Instr, addr: np.ndarray, lanes: np.ndarray, size: int) -> None:
        self.total["gl_atomic_sectors"] += self._sectors(ins, addr, lanes, size)

    def bulk(self, ins: Instr, load: bool, moved: int, sectors: int) -> None:
        """A copy by the async engine: whole rows."""
        kind = "ld" if load else "st"
        self.total[f"gl_{kind}_bytes"] += moved
        self.total[f"gl_{kind}_sectors"] += sectors
        t = self.by_line[ins.line]
        t.requests += 1
        t.bytes += moved
        t.sectors += sectors
        t.least += -(-moved // SECTOR)

    def shared(self, ins: Instr, at: np.ndarray, lanes: np.ndarray, size: int) -> None:
        """Wavefronts of an ordinary access: 128 bytes of lanes at a time, 32 banks of 4 bytes."""
        per = max(1, min(32, 128 // max(size, 4)))  # lanes of one wavefront
        self._wavefronts(ins, at, lanes // per, max(size, 4))

    def matrix(self, ins: Instr, rows: np.ndarray, group: np.ndarray) -> None:
        """ldmatrix and stmatrix: eight rows of 16 bytes a wavefront."""
        self._wavefronts(ins, rows, group, 16)

    def _wavefronts(self, ins: Instr, at: np.ndarray, group: np.ndarray, size: int) -> None:
        words = at // 4
        key = (group << 28) + words
        if size > 4:
            key = (key[:, None] + np.arange(size // 4)).reshape(-1)
        key = np.sort(key)
        key = key[np.r_[True, key[1:] != key[:-1]]]  # one word serves many lanes
        _, which = np.unique(key >> 28, return_inverse=True)
        groups = int(which[-1]) + 1 if len(which) else 0
        load = np.bincount(which * 32 + (key & 31), minlength=groups * 32)
        waves = int(load.reshape(groups, 32).max(1).sum())
        self.total["smem_wavefronts"] += waves
        self.total["smem_ideal"] += groups
        t = self.by_line[ins.line]
        t.wavefronts += waves
        t.ideal += groups
