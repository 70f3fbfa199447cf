"""Loads and stores with their bounds, alignment, initialisation and race checks."""

from __future__ import annotations

import functools
import re

import numpy as np

from .formats import GBASE, SBASE, WIDTH, PtxError
from .parser import Instr
from .racecheck import Clocks, SharedRaces
from .registers import Ids, Launch, Mask, Registers

RANK_SHIFT = 24  # a shared::cluster address carries rank + 1 above the offset
ORDERED = {"acquire", "release", "relaxed", "acq_rel", "volatile", "seq_cst", "mmio"}
IN_FLIGHT = 2  # a shared byte's state from the issue of a copy until it has been waited for
FULL = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@functools.cache
def split_address(text: str) -> tuple[str, int]:
    """`[base + offset]` as (base, offset)."""
    text = text.strip()[1:-1].strip()
    m = re.match(r"(.+?)\s*\+\s*(-?\w+)$", text)
    return (m[1].strip(), int(m[2], 0)) if m else (text, 0)


def gather(memory: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
    """Bytes `[len(at), size]` at aligned indices."""
    return memory.reshape(-1, size).take(at // size, axis=0)


def complete(flags: np.ndarray) -> np.ndarray:
    """Rows of `flags` (0 or 1 a byte) that are all ones."""
    size = flags.shape[1]
    w = min(size, 8)
    words = flags.view(UINT[w]) == FULL[w]
    return words[:, 0] if words.shape[1] == 1 else words.all(1)


def grain_of(code: list[Instr], spaces: tuple[str, ...], largest: int) -> int:
    """The smallest access, in bytes, that `code` makes to one of `spaces` (or generic)."""
    grain = largest
    for ins in code:
        op = ins.op
        if op[0] not in ("ld", "st", "atom", "red", "ldu") or op[-1] not in WIDTH:
            continue
        named = [m for m in op if m.startswith(("shared", "global", "param", "const"))]
        if named and not named[0].startswith(spaces):
            continue
        count = next((int(m[1:]) for m in op if m in ("v2", "v4", "v8")), 1)
        grain = min(grain, max(1, WIDTH[op[-1]] * (count if op[0] in ("ld", "st", "ldu") else 1)))
    return grain


class Memory(Registers):
    """Global, shared and parameter space."""

    def __init__(self, m, k, launch: Launch, blocks: list[tuple[int, Ids]]) -> None:  # type: ignore[no-untyped-def]
        super().__init__(m, k, launch, blocks)
        self.sinit = np.zeros(len(self.smem), np.uint8)
        numbers = np.array([number for number, _ in blocks])
        total = int(np.prod(launch.grid))
        self.cluster = int(np.prod(launch.cluster))
        self.clocks = Clocks(numbers, self.warps, self.cluster, total, m.between)
        self.row = np.arange(self.n) // 32
        self.races = SharedRaces(self.clocks, len(self.smem), m.grain)
        self.waited = np.zeros(self.n, np.bool_)  # threads that have passed griddepcontrol.wait
        self.polled = False
        self.progress = 0  # stores that changed something, threads that were woken

    def addr(self, a: str) -> np.ndarray:
        """The address operand of every thread, int64."""
        base, offset = split_address(a)
        v = self.r.get(base)
        if v is not None:
            if self.undefined and base in self.undefined:
                self._refuse_undefined(base)
            return v.astype(np.int64) + offset
        if base in self.k.regs:
            self.raw(base)
        return np.full(self.n, int(self._scalar(base)) + offset, np.int64)

    def shared_index(
        self, addr: np.ndarray, lanes: np.ndarray, size: int, aligned: bool = True
    ) -> np.ndarray:
        """Index into `smem` of shared or generic addresses, checked for bounds and alignment."""
        at = np.where(addr >= SBASE, addr - SBASE, addr)
        base = self.base[lanes]
        if (at >= 1 << RANK_SHIFT).any():
            rank, at = at >> RANK_SHIFT, at & (1 << RANK_SHIFT) - 1
            first = self.slot[lanes] // self.cluster * self.cluster
            target = np.where(rank > 0, first + rank - 1, self.slot[lanes])
            if (rank > self.cluster).any():
                raise self.fault("address of a block outside the cluster", lanes[0])
            base = target * self.stride
        if aligned and size > 1 and (at % size).any():
            i = int(np.argmax(at % size != 0))
            raise self.fault(
                f"misaligned {size}-byte access to shared memory", lanes[i], int(at[i])
            )
        bad = (at < 0) | (at + size > self.limit)
        if bad.any():
            i = int(np.argmax(bad))
            what = f"out of bounds shared access ({self.limit} bytes are there)"
            raise self.fault(what, lanes[i], int(at[i]))
        return at + base

    def is_shared(self, addr: np.ndarray, space: str, lanes: np.ndarray) -> bool:
        """Whether the addresses lie in shared memory."""
        if space != "generic":
            return space == "shared"
        inside = (addr >= SBASE) & (addr < GBASE)
        if inside.any() and not inside.all():
            raise self.fault("lanes of one instruction in two spaces", lanes[0])
        return bool(inside.all())

    # ---- shared -------------------------------------------------------------------------------

    def granules(self, at: np.ndarray, size: int, *per: np.ndarray | None):
        """Granule numbers of `size` bytes at each `at`, and `per` arrays repeated to match."""
        g = self.m.grain
        count = max(1, size // g)
        if count == 1:
            return (at // g, *per)
        out = (at[:, None] // g + np.arange(count)).reshape(-1)
        return (out, *(p if p is None else np.repeat(p, count) for p in per))

    def shared_read(self, at: np.ndarray, lanes: np.ndarray, size: int) -> np.ndarray:
        """Checked bytes `[len(at), size]`."""
        self.check_written(at, lanes, size)
        g, rows, lane = self.granules(at, size, self.row[lanes], lanes % 32)
        self.raise_race(self.races.read(g, rows, lane), g, at, lanes)
        return gather(self.smem, at, size)

    def check_written(self, at: np.ndarray, lanes: np.ndarray, size: int) -> None:
        """Shared bytes that are read must have been written, and not wait for a copy."""
        state = gather(self.sinit, at, size)
        ok = complete(state)
        if ok.all():
            return
        flying = (state == IN_FLIGHT).any(1)
        if flying.any():
            i = int(np.argmax(flying))
            what = "read of shared memory whose asynchronous copy has not been waited for"
            raise self.fault(what, lanes[i], int(at[i]) % self.stride)
        if self.m.shared_init:
            i = int(np.argmin(ok))
            raise self.fault(
                "read of uninitialised shared memory", lanes[i], int(at[i]) % self.stride
            )

    def shared_write(self, at: np.ndarray, lanes: np.ndarray, data: np.ndarray) -> None:
        """Checked store of `data` `[len(at), size]`."""
        size = data.shape[1]
        before = gather(self.smem, at, size)
        known = complete(gather(self.sinit, at, size))
        changes = (before != data).any(1) | ~known
        self.progress += int(changes.any())
        g, rows, lane, changed = self.granules(at, size, self.row[lanes], lanes % 32, changes)
        self.raise_race(self.races.write(g, rows, lane, changed), g, at, lanes)
        self.put_shared(at, lanes, data)

    def put_shared(self, at: np.ndarray, lanes: np.ndarray, data: np.ndarray) -> None:
        """Store `data`; two threads of one instruction must agree on what they store."""
        size = data.shape[1]
        self.smem.reshape(-1, size)[at // size] = data
        self.sinit.reshape(-1, size)[at // size] = 1
        lost = (gather(self.smem, at, size) != data).any(1)
        if lost.any():
            i = int(np.argmax(lost))
            what = "shared-memory race: two threads write different values at once"
            raise self.fault(what, lanes[i], int(at[i]) % self.stride)

    def raise_race(
        self, found: tuple[int, str] | None, granules: np.ndarray, at: np.ndarray, lanes: np.ndarray
    ) -> None:
        if found:
            i = found[0]
            lane = lanes[i * len(lanes) // len(granules)]
            raise self.fault(found[1], lane, int(granules[i]) * self.m.grain % self.stride)

    # ---- global -------------------------------------------------------------------------------

    def global_index(
        self, addr: np.ndarray, lanes: np.ndarray, size: int, read: bool
    ) -> np.ndarray:
        """Index into the arena, checked for alignment, bounds and (read) initialisation."""
        m, at = self.m, addr - GBASE
        if m.dependent and not self.waited[lanes].all():
            what = "global access before griddepcontrol.wait: the kernel before may still run"
            raise self.fault(what, lanes[int(np.argmin(self.waited[lanes]))], int(addr[0]))
        if size > 1 and (at % size).any():
            i = int(np.argmax(at % size != 0))
            raise self.fault(f"misaligned {size}-byte access", lanes[i], int(addr[i]))
        outside = (at < 0) | (at + size > m.top)
        if not outside.any():
            outside = ~(m.ok[at] & m.ok[at + size - 1])
        if outside.any():
            i = int(np.argmax(outside))
            raise self.fault(m.why_outside(int(addr[i])), lanes[i], int(addr[i]))
        if read:
            ok = complete(gather(m.init, at, size))
            if not ok.all():
                i = int(np.argmin(ok))
                raise self.fault("read of uninitialised global memory", lanes[i], int(addr[i]))
        return at

    def global_race(
        self, at: np.ndarray, lanes: np.ndarray, size: int, write: bool, atomic: bool = False,
        changes: np.ndarray | None = None, bulk: bool = False,
    ) -> None:  # fmt: skip
        g = self.m.races.grain
        count = max(1, size // g)
        rows = self.row[lanes]
        where = at // g
        if count > 1:
            where = (where[:, None] + np.arange(count)).reshape(-1)
            rows = np.repeat(rows, count)
            changes = None if changes is None else np.repeat(changes, count)
        found = self.m.races.access(self.clocks, where, rows, write, atomic, changes, bulk)
        if found:
            i = found[0]
            raise self.fault(found[1], lanes[i // count], GBASE + int(where[i]) * g)

    def global_read(
        self, addr: np.ndarray, lanes: np.ndarray, size: int, atomic: bool = False
    ) -> np.ndarray:
        at = self.global_index(addr, lanes, size, True)
        self.global_race(at, lanes, size, False, atomic)
        return gather(self.m.mem, at, size)

    def global_write(
        self, addr: np.ndarray, lanes: np.ndarray, data: np.ndarray, atomic: bool = False,
        bulk: bool = False,
    ) -> None:  # fmt: skip
        size = data.shape[1]
        at = self.global_index(addr, lanes, size, False)
        changes = (gather(self.m.mem, at, size) != data).any(1)
        self.progress += int(changes.any())
        self.global_race(at, lanes, size, True, atomic, changes, bulk)
        self.m.mem.reshape(-1, size)[at // size] = data
        self.m.init.reshape(-1, size)[at // size] = 1

    # ---- instructions -------------------------------------------------------------------------

    def space_of(self, mods: list[str]) -> str:
        for q in mods:
            for space in ("shared", "global", "param", "const"):
                if q.startswith(space):
                    return "global" if space == "const" else space
        return "generic"

    def load(self, ins: Instr, space: str, addr: np.ndarray, size: int, act: Mask) -> np.ndarray:
        """Bytes `[n, size]`; zeros for the threads that do not load."""
        lanes = self.lanes(act)
        at = addr if act is None else addr[lanes]
        ordered = not ORDERED.isdisjoint(ins.op)
        if self.is_shared(at, space, lanes):
            at = self.shared_index(at, lanes, size)
            data = gather(self.smem, at, size) if ordered else self.shared_read(at, lanes, size)
            self.m.counters.shared(ins, at, lanes, size)
        elif (at < 1 << 20).all() and (at >= 0).all() and (at + size <= len(self.params)).all():
            data = self.params[at[:, None] + np.arange(size)]  # a generic address of a parameter
        else:
            data = self.global_read(at, lanes, size, ordered)
            self.m.counters.load(ins, at, lanes, size)
        if ordered:
            self.observe(ins, at, lanes)
        if act is None:
            return data
        out = np.zeros((self.n, size), np.uint8)
        out[lanes] = data
        return out

    def op_ld(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        w = WIDTH[ty]
        regs = self.vec(args[0])
        size, space = w * len(regs), self.space_of(mods)
        if space == "param":
            base, offset = split_address(args[1])
            if base in self.pv:
                self._load_param(regs, self.pv[base] + offset, w, ty, act)
                return
        data = self.load(ins, space, self.addr(args[1]), size, act)
        if len(regs) == 1:
            self.put(regs[0], self.widen(data.view(UINT[w])[:, 0], regs[0], ty), act)
            return
        columns = data.view(UINT[w])
        for j, reg in enumerate(regs):
            self.put(reg, self.widen(columns[:, j], reg, ty), act)

    op_ldu = op_ld

    def _load_param(self, regs: list[str], at: int, w: int, ty: str, act: Mask) -> None:
        for j, reg in enumerate(regs):
            data = self.params[at + j * w : at + (j + 1) * w]
            if len(data) < w:
                raise self.fault("read past the last parameter")
            value = np.repeat(np.frombuffer(data.tobytes(), UINT[w]), self.n)
            self.put(reg, self.widen(value, reg, ty), act)

    def widen(self, v: np.ndarray, reg: str, ty: str) -> np.ndarray:
        """Sign- or zero-extend a loaded value to its register."""
        if reg == "_":
            return v
        w = WIDTH[self.k.regs[reg]]
        if v.dtype.itemsize < w and ty[0] == "s":
            return v.view(f"i{v.dtype.itemsize}").astype(f"i{w}")
        return v

    def op_griddepcontrol(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        """Launches run one after another; who may not touch memory yet is known all the same."""
        if mods[0] == "wait":
            self.waited[self.lanes(act)] = True

    def op_st(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        w, values = WIDTH[ty], self.vec(args[1])
        if len(values) == 1:
            data = np.ascontiguousarray(self.val(values[0], ty)).view(np.uint8).reshape(-1, w)
        else:
            data = np.stack([self.val(v, ty) for v in values], 1).view(np.uint8)
        self.store(ins, self.space_of(mods), self.addr(args[0]), data, act)

    def store(self, ins: Instr, space: str, addr: np.ndarray, data: np.ndarray, act: Mask) -> None:
        lanes, size = self.lanes(act), data.shape[1]
        at, data = (addr, data) if act is None else (addr[lanes], data[lanes])
        ordered = not ORDERED.isdisjoint(ins.op)
        if ordered:
            self.publish(ins, at, lanes)
        if self.is_shared(at, space, lanes):
            at = self.shared_index(at, lanes, size)
            if ordered:
                self.smem.reshape(-1, size)[at // size] = data
                self.sinit.reshape(-1, size)[at // size] = 1
            else:
                self.shared_write(at, lanes, data)
            self.m.counters.shared(ins, at, lanes, size)
        else:
            self.global_write(at, lanes, data, ordered)
            self.m.counters.store(ins, at, lanes, size)

    # What flags do is defined with the atomics.
    def observe(self, ins: Instr, at: np.ndarray, lanes: np.ndarray) -> None:
        raise NotImplementedError

    def publish(self, ins: Instr, at: np.ndarray, lanes: np.ndarray) -> None:
        raise NotImplementedError


__all__ = ["Memory", "PtxError", "complete", "gather", "grain_of", "split_address"]
