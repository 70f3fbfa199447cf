"""Atomics, fences and flags: how blocks (and warps) order each other through memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .formats import PACKED, WIDTH, numbers, packed
from .memory import UINT, Memory, gather
from .parser import Instr
from .racecheck import FENCED, FENCED_GLOBAL
from .registers import Mask

Fn = Callable[[np.ndarray, np.ndarray], np.ndarray]
ATOMIC: dict[str, Fn] = {
    "add": lambda old, new: old + new,
    "exch": lambda old, new: new,
    "max": np.maximum,
    "min": np.minimum,
    "or": lambda old, new: old | new,
    "and": lambda old, new: old & new,
    "xor": lambda old, new: old ^ new,
    "inc": lambda old, new: np.where(old >= new, 0, old + 1).astype(old.dtype),
    "dec": lambda old, new: np.where((old == 0) | (old > new), new, old - 1).astype(old.dtype),
}


class Atomics(Memory):
    """atom, red, fence and membar."""

    initialised: dict[int, np.ndarray]  # row: its clock at fence.mbarrier_init

    def observe(self, ins: Instr, at: np.ndarray, lanes: np.ndarray) -> None:
        """A read of flags at `at`: acquire at once, or at the next fence when relaxed."""
        self.polled = True
        if not self.clocks.between:
            return
        acquires = not {"acquire", "acq_rel"}.isdisjoint(ins.op)
        for row, address in set(zip(self.row[lanes].tolist(), at.tolist())):
            clock = self.m.races.observe(self.clocks, row, address)
            if clock is None:
                continue
            if acquires:
                self.clocks.acquire(np.array([row]), clock)
            else:
                self.clocks.show(row, clock)

    def publish(self, ins: Instr, at: np.ndarray, lanes: np.ndarray) -> None:
        """A write of flags at `at`: releases all so far, or what the last fence covered."""
        if not self.clocks.between:
            return
        releases = not {"release", "acq_rel"}.isdisjoint(ins.op)
        for row, address in set(zip(self.row[lanes].tolist(), at.tolist())):
            if releases:
                clock = self.clocks.clock[row].copy()
                self.clocks.bump(np.array([row]))
            else:
                clock = self.clocks.published(row)
            self.m.races.publish(self.clocks, row, address, clock)

    def op_fence(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        rows = np.unique(self.row[self.lanes(act)])
        if mods and mods[0] == "proxy":
            if "async" in mods or any(q.startswith("async::") for q in mods):
                last = mods[-1].split("::")[0]  # the one memory that the fence is for
                parts = {"shared": (FENCED,), "global": (FENCED_GLOBAL,)}
                self.clocks.proxy_fence(rows, parts.get(last, (FENCED, FENCED_GLOBAL)))
            return
        if mods and mods[0] == "mbarrier_init":
            for row in rows.tolist():
                self.initialised[row] = self.clocks.clock[row].copy()
            self.clocks.bump(rows)
            return
        self.clocks.memory_fence(rows)

    op_membar = op_fence

    def op_red(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        self.atomic(ins, mods, None, args[0], self.vec(args[1]), None, act)

    def op_atom(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        compare = args[3] if "cas" in mods else None
        self.atomic(ins, mods, self.vec(args[0]), args[1], self.vec(args[2]), compare, act)

    def atomic(
        self, ins: Instr, mods: list[str], outs: list[str] | None, where: str, values: list[str],
        swap: str | None, act: Mask,
    ) -> None:  # fmt: skip
        """old = [where]; [where] = op(old, value), one thread after another."""
        ty = mods[-1]
        w, lanes = WIDTH[ty], self.lanes(act)
        op = "cas" if "cas" in mods else next(q for q in mods if q in ATOMIC)
        first, shared = self.addr(where)[lanes], None
        shared = self.is_shared(first, self.space_of(mods), lanes)
        if len(values) > 1 and (first % (w * len(values))).any():
            raise self.fault("misaligned vector atomic", lanes[0], int(first[0]))
        publishes, last = not shared or self.cluster > 1, first
        if publishes:
            self.publish(ins, first, lanes)
        for j, name in enumerate(values):
            at = first + j * w
            if shared:
                at = self.shared_index(at, lanes, w)
                self.check_written(at, lanes, w)
                memory = self.smem
            else:
                index = self.global_index(at, lanes, w, True)
                self.global_race(index, lanes, w, True, True)
                self.m.counters.atomic(ins, at, lanes, w)
                at, memory = index, self.m.mem
            value = self.val(name, PACKED.get(ty, ty))[lanes]
            other = None if swap is None else self.val(swap, ty)[lanes]
            old = self._apply(memory, at, w, op, ty, value, other)
            self.progress += int((gather(memory, at, w).view(UINT[w])[:, 0] != old).any())
            if outs is not None:
                full = np.zeros(self.n, UINT[w])
                full[lanes] = old
                self.put(outs[j], full, act)
        if publishes:
            self.observe(ins, last, lanes)
        self.polled = True
        self.m.count["atomics"] += len(lanes)

    @staticmethod
    def _apply(
        memory: np.ndarray, at: np.ndarray, w: int, op: str, ty: str, value: np.ndarray,
        other: np.ndarray | None,
    ) -> np.ndarray:  # fmt: skip
        """Threads with distinct addresses at once, the k-th on an address in round k."""
        order = np.argsort(at, kind="stable")
        ranked = at[order]
        new = np.r_[True, ranked[1:] != ranked[:-1]]
        start = np.maximum.accumulate(np.where(new, np.arange(len(at)), 0))
        turn = np.empty(len(at), np.int64)
        turn[order] = np.arange(len(at)) - start
        result = np.zeros(len(at), UINT[w])
        words = memory.reshape(-1, w).view(UINT[w])[:, 0]
        for k in range(int(turn.max()) + 1):
            sel = np.nonzero(turn == k)[0]
            old = words[at[sel] // w]
            result[sel] = old
            v = value[sel]
            if op == "cas":
                assert other is not None
                new_bits = np.where(old == v.view(UINT[w]), other[sel].view(UINT[w]), old)
            else:
                mixed = ATOMIC[op](numbers(old, ty), numbers(v, ty))
                new_bits = packed(mixed, ty).view(UINT[w])
            words[at[sel] // w] = new_bits
        return result
