"""cp.async: copies whose result a thread sees only after it has waited for them."""

from __future__ import annotations

import dataclasses

import numpy as np

from .memory import IN_FLIGHT
from .parser import Instr
from .registers import Mask
from .warp import WarpWide


@dataclasses.dataclass
class Copy:
    """An issued cp.async: one row a thread, in that thread's commit group."""

    lanes: np.ndarray
    at: np.ndarray
    data: np.ndarray
    group: np.ndarray

    def part(self, which: np.ndarray) -> Copy:
        """The rows of some threads."""
        return Copy(self.lanes[which], self.at[which], self.data[which], self.group[which])


class AsyncCopies(WarpWide):
    """Ampere's asynchronous copies."""

    def prepare(self) -> None:
        """State of a run; called by the scheduler before the first instruction."""
        self.copies: list[Copy] = []
        self.group = np.zeros(self.n, np.int64)  # commit groups that a thread has closed

    def op_cp(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        lanes = self.lanes(act)
        if "bulk" in mods:
            self.bulk(ins, mods, args, lanes)
        elif mods[0] != "async":
            raise self.fault(f"opcode not known: {ins.text}")
        elif mods[1] == "commit_group":
            self.group[lanes] += 1
        elif mods[1] == "wait_group":
            self._finish(lanes, self.group[lanes] - int(args[0], 0))
        elif mods[1] == "wait_all":
            self._finish(lanes, self.group[lanes] + 1)
        elif mods[1] == "mbarrier":
            self._arrive_after(args[0], lanes, "noinc" in mods)
        else:
            self._issue(args, lanes)

    def bulk(self, ins: Instr, mods: list[str], args: list[str], lanes: np.ndarray) -> None:
        raise self.fault(f"opcode not known: {ins.text}")

    def _issue(self, args: list[str], lanes: np.ndarray) -> None:
        size = int(args[2], 0)
        at = self.shared_index(self.addr(args[0])[lanes], lanes, size)
        source = self.addr(args[1])[lanes]
        moved = np.full(len(lanes), size)
        if len(args) > 3 and self.k.regs.get(args[3]) == "pred":
            moved[self.pval(args[3])[lanes]] = 0
        elif len(args) > 3:
            moved = self.val(args[3], "u32")[lanes].astype(np.int64)
        if (moved > size).any():
            raise self.fault("cp.async of more bytes than its size", lanes[0])
        data = np.zeros((len(lanes), size), np.uint8)
        for count in np.unique(moved[moved > 0]).tolist():
            sel = np.nonzero(moved == count)[0]
            if count == size:
                data[sel] = self.global_read(source[sel], lanes[sel], size)
            else:
                part = (source[sel, None] + np.arange(count)).reshape(-1)
                who = np.repeat(lanes[sel], count)
                data[sel, :count] = self.global_read(part, who, 1).reshape(-1, count)
            self.m.counters.load(self.ins, source[sel], lanes[sel], count)
        # From the issue on the old value is gone: earlier readers must have finished.
        g, rows, lane = self.granules(at, size, self.row[lanes], lanes % 32)
        self.raise_race(self.races.write(g, rows, lane, np.ones(len(g), bool)), g, at, lanes)
        self.sinit.reshape(-1, size)[at // size] = IN_FLIGHT
        self.smem.reshape(-1, size)[at // size] = 0xCD
        self.copies.append(Copy(lanes, at, data, self.group[lanes].copy()))

    def _finish(self, lanes: np.ndarray, below: np.ndarray) -> None:
        """Complete the copies of `lanes` in groups below `below`."""
        if not self.copies:
            return
        limit = np.full(self.n, -1, np.int64)
        limit[lanes] = below
        left = []
        for copy in self.copies:
            done = copy.group < limit[copy.lanes]
            if done.all():
                self._land(copy)
            elif done.any():
                self._land(copy.part(done))
                left.append(copy.part(~done))
            else:
                left.append(copy)
        self.copies = left

    def _land(self, copy: Copy) -> None:
        """Make the bytes visible, as written now; that nothing else touches them was checked."""
        size = copy.data.shape[1]
        g, rows, lane = self.granules(copy.at, size, self.row[copy.lanes], copy.lanes % 32)
        self.races.record(g, rows, lane)
        self.put_shared(copy.at, copy.lanes, copy.data)
        self.progress += 1

    def _arrive_after(self, where: str, lanes: np.ndarray, noinc: bool) -> None:
        """The mbarrier gets an arrival of each thread once its earlier copies are complete."""
        for b, mine in self._by_barrier(where, lanes):
            if not noinc:
                b.pending += len(mine)

            def finish(b=b, mine=mine, ins=self.ins) -> None:  # type: ignore[no-untyped-def]
                before, self.ins = self.ins, ins
                self._finish(mine, self.group[mine] + 1)
                self.clocks.release(np.unique(self.row[mine]), b.clock)
                self.ins = before
                self.arrive(b, len(mine), int(mine[0]))

            b.copies.append(finish)
