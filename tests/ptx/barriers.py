"""Block barriers and mbarriers: threads wait, clocks pass on, faults are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from .atomics import Atomics
from .formats import SBASE
from .memory import RANK_SHIFT
from .parser import Instr
from .racecheck import MBARRIERS
from .registers import Mask


@dataclasses.dataclass
class Barrier:
    """A named block barrier between its first arrival and its completion."""

    clock: np.ndarray
    expected: int
    arrived: int = 0
    waiting: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    rows: list[np.ndarray] = dataclasses.field(default_factory=list)
    whole: bool = False  # no count was given: every thread that has not exited
    true: int = 0  # bar.red: predicates that held
    results: list[tuple[str, np.ndarray]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class MBarrier:
    """`phase` counts completed phases; `pending` arrivals and `tx` bytes keep the next open."""

    at: int
    count: int
    clock: np.ndarray
    seen: np.ndarray
    column: int
    pending: int = 0
    tx: int = 0
    phase: int = 0
    waiting: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    copies: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    last: dict[int, int] = dataclasses.field(default_factory=dict)  # thread: phase it waited for


class Barriers(Atomics):
    """bar, barrier and mbarrier."""

    bars: dict[tuple[int, int], Barrier]
    mbars: dict[int, MBarrier]
    columns: dict[int, int]  # mbarriers that a block has made
    leave: Mask  # threads that do not go on to the next instruction
    expired: bool  # waits time out: nothing else can run
    pc: int

    def resume(self, pc: int, mask: np.ndarray) -> None:
        """Make threads runnable at `pc` (the scheduler's)."""
        raise NotImplementedError

    def stop(self, mask: np.ndarray) -> None:
        """Take threads out of the running group."""
        self.leave = mask if self.leave is None else self.leave | mask

    # ---- bar.sync and its family --------------------------------------------------------------

    def op_bar(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        mods = [q for q in mods if q not in ("cta", "aligned")]
        if mods[0] == "warp":
            rows = np.unique(self.row[self.lanes(act)])
            self.clocks.sync[rows] += 1
            return
        if mods[0] == "cluster":
            self._cluster_barrier(mods, act)
            return
        if mods[0] == "red":
            self._reduce(mods, args, act)
            return
        number = self.val(args[0], "u32")
        counts = self.val(args[1], "u32") if len(args) > 1 else None
        wait = "arrive" not in mods
        if act is None and counts is None and not self.bars and (number == number[0]).all():
            self.clocks.meet(np.arange(len(self.blocks)))
            self.m.count["barriers"] += len(self.blocks)
            return
        lanes = self.lanes(act)
        for slot in np.unique(self.slot[lanes]).tolist():
            mine = lanes[self.slot[lanes] == slot]
            for bid in np.unique(number[mine]).tolist():
                self._arrive(slot, bid, mine[number[mine] == bid], counts, wait)

    op_barrier = op_bar

    def _reduce(self, mods: list[str], args: list[str], act: Mask) -> None:
        """bar.red: a barrier that hands every thread the count, or, or and of a predicate."""
        lanes = self.lanes(act)
        number, true = self.val(args[1], "u32"), self.pval(args[-1])
        counts = self.val(args[2], "u32") if len(args) > 3 else None
        for slot in np.unique(self.slot[lanes]).tolist():
            mine = lanes[self.slot[lanes] == slot]
            bid = int(number[mine[0]])
            if (number[mine] != bid).any():
                raise self.fault("bar.red with different barriers in one instruction", mine[0])
            b = self._arrive(slot, bid, mine, counts, True, finish=False)
            b.true += int(true[mine].sum())
            b.results.append((args[0], mine))
            if b.arrived == b.expected:
                total = {"popc": b.true, "or": b.true > 0, "and": b.true == b.expected}
                for name, who in b.results:
                    mask = np.zeros(self.n, np.bool_)
                    mask[who] = True
                    value = next(v for k, v in total.items() if k in mods)
                    self.put(name, np.full(self.n, value, np.uint32), mask)
                self._complete(slot, bid, b)

    def _arrive(
        self, slot: int, bid: int, lanes: np.ndarray, counts: np.ndarray | None, wait: bool,
        finish: bool = True,
    ) -> Barrier:  # fmt: skip
        block = slice(slot * self.per, (slot + 1) * self.per)
        alive = int(self.alive[block].sum())
        expected = alive if counts is None else int(counts[lanes[0]])
        b = self.bars.get((slot, bid))
        if b is None:
            b = self.bars[slot, bid] = Barrier(self.clocks.fresh(), expected, whole=counts is None)
        if b.expected != expected:
            what = f"barrier {bid}: {expected} threads expected here, {b.expected} by its others"
            raise self.fault(what, lanes[0])
        if expected % 32:
            raise self.fault(f"barrier {bid}: {expected} threads are no whole warps", lanes[0])
        rows = np.unique(self.row[lanes])
        self.clocks.release(rows, b.clock)
        b.arrived += len(lanes)
        if wait:
            mask = np.zeros(self.n, np.bool_)
            mask[lanes] = True
            b.waiting.append((self.pc + 1, mask))
            b.rows.append(rows)
            self.stop(mask)
        if b.arrived > b.expected:
            what = f"barrier {bid}: {b.arrived} threads arrived, {b.expected} were expected"
            raise self.fault(what, lanes[0])
        if finish and b.arrived == b.expected:
            self._complete(slot, bid, b)
        return b

    def _complete(self, slot: int, bid: int, b: Barrier) -> None:
        if b.rows:
            self.clocks.acquire(np.concatenate(b.rows), b.clock)
        del self.bars[slot, bid]
        self.m.count["barriers"] += 1
        for pc, mask in b.waiting:
            self.resume(pc, mask)

    def threads_exited(self, slots: np.ndarray) -> None:
        """A block barrier without a count no longer waits for threads that have exited."""
        for (slot, bid), b in list(self.bars.items()):
            if b.whole and slot in slots:
                block = slice(slot * self.per, (slot + 1) * self.per)
                b.expected = int(self.alive[block].sum())
                if b.arrived and b.arrived == b.expected:
                    self._complete(slot, bid, b)

    def _cluster_barrier(self, mods: list[str], act: Mask) -> None:
        """barrier.cluster.arrive and .wait over the blocks of each cluster."""
        lanes = self.lanes(act)
        size = self.per * self.cluster
        for c in np.unique(lanes // size).tolist():
            mine = lanes[lanes // size == c]
            key = (-1 - c, 0)
            alive = int(self.alive[c * size : (c + 1) * size].sum())
            b = self.bars.setdefault(key, Barrier(self.clocks.fresh(), alive))
            rows = np.unique(self.row[mine])
            if mods[1] == "arrive":
                if "relaxed" not in mods:
                    self.clocks.release(rows, b.clock)
                for row in rows.tolist():
                    if row in self.initialised:  # what fence.mbarrier_init releases
                        np.maximum(b.clock, self.initialised[row], out=b.clock)
                b.arrived += len(mine)
                if b.arrived > b.expected:
                    raise self.fault("cluster barrier: a thread arrived twice", mine[0])
            else:
                mask = np.zeros(self.n, np.bool_)
                mask[mine] = True
                b.waiting.append((self.pc + 1, mask))
                b.rows.append(rows)
                self.stop(mask)
            waiting = sum(int(m.sum()) for _, m in b.waiting)
            if b.arrived == b.expected and waiting == b.expected:
                self.clocks.acquire(np.concatenate(b.rows), b.clock)
                del self.bars[key]
                for pc, mask in b.waiting:
                    self.resume(pc, mask)

    def op_mapa(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        """The address of the same variable in another block of the cluster."""
        ty = mods[-1]
        local = self.val(args[1], ty).astype(np.int64)
        rank = self.val(args[2], "u32").astype(np.int64)
        if (rank[self.lanes(act)] >= self.cluster).any():
            raise self.fault(f"mapa to a rank beyond the cluster of {self.cluster}")
        window = np.where(local >= SBASE, SBASE, 0)
        offset = (local - window) & ((1 << RANK_SHIFT) - 1)
        self.put(args[0], (window + ((rank + 1) << RANK_SHIFT) + offset).astype(np.uint64), act)

    # ---- mbarriers ----------------------------------------------------------------------------

    def mbarrier(self, at: int, lane: int) -> MBarrier:
        b = self.mbars.get(int(at))
        if b is None:
            what = "no mbarrier was initialised here"
            raise self.fault(what, lane, int(at) % max(1, self.stride))
        return b

    def _by_barrier(self, where: str, lanes: np.ndarray) -> list[tuple[MBarrier, np.ndarray]]:
        at = self.shared_index(self.addr(where)[lanes], lanes, 8)
        if (at == at[0]).all():
            return [(self.mbarrier(at[0], lanes[0]), lanes)]
        return [(self.mbarrier(a, lanes[0]), lanes[at == a]) for a in np.unique(at)]

    def op_mbarrier(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        lanes = self.lanes(act)
        if mods[0] == "init":
            self._init(args, lanes)
        elif mods[0] == "inval":
            for at in np.unique(self.shared_index(self.addr(args[0])[lanes], lanes, 8)).tolist():
                self.refuse_busy(self.mbarrier(at, lanes[0]), lanes[0])
                del self.mbars[at]
        elif mods[0] == "arrive":
            out = None if args[0][0] == "[" else args[0]
            rest = args if out is None else args[1:]
            self._mbarrier_arrive(mods, out, rest, lanes, act)
        elif mods[0] in ("expect_tx", "complete_tx"):
            size = self.val(args[1], "u32")
            sign = 1 if mods[0] == "expect_tx" else -1
            for b, mine in self._by_barrier(args[0], lanes):
                b.tx += sign * int(size[mine].sum())
                self.try_complete(b)
        elif mods[0] in ("try_wait", "test_wait"):
            self._wait(mods, args, lanes, act)
        else:
            raise self.fault("mbarrier instruction not known")

    def _init(self, args: list[str], lanes: np.ndarray) -> None:
        count = self.val(args[1], "u32")
        for lane in lanes.tolist():
            at = int(self.shared_index(self.addr(args[0])[[lane]], lanes[:1] * 0 + lane, 8)[0])
            if at in self.mbars:
                self.refuse_busy(self.mbars[at], lane)
            slot = int(self.slot[lane])
            made = self.columns.setdefault(slot, 0)
            self.columns[slot] += 1
            column = self.clocks.mbarriers + slot % self.cluster * MBARRIERS + made % MBARRIERS
            fresh = self.clocks.fresh
            b = MBarrier(at, int(count[lane]), fresh(), fresh(), column, int(count[lane]))
            if b.count < 1:
                raise self.fault(f"mbarrier initialised with count {b.count}", lane)
            self.mbars[at] = b
            at8 = np.arange(at, at + 8) // self.m.grain
            rows = np.full(len(at8), self.row[lane])
            found = self.races.write(
                at8, rows, np.full(len(at8), lane % 32), np.ones(len(at8), bool)
            )
            if found:
                raise self.fault(found[1], lane, at % self.stride)

    def refuse_busy(self, b: MBarrier, lane: int) -> None:
        """An mbarrier that threads or copies still use may not be re-initialised."""
        if b.waiting or b.copies or b.tx:
            raise self.fault("mbarrier re-initialised or invalidated while in use", lane, b.at)

    def _mbarrier_arrive(
        self, mods: list[str], out: str | None, args: list[str], lanes: np.ndarray, act: Mask
    ) -> None:
        expect = "expect_tx" in mods
        amount = self.val(args[1], "u32") if len(args) > 1 else None
        states = np.zeros(self.n, np.uint64)
        for b, mine in self._by_barrier(args[0], lanes):
            self._needs_init_seen(b, mine)
            states[mine] = b.phase
            if expect and amount is not None:
                b.tx += int(amount[mine].sum())
            arrivals = int(amount[mine].sum()) if amount is not None and not expect else len(mine)
            rows = np.unique(self.row[mine])
            if "relaxed" not in mods:
                self.clocks.release(rows, b.clock)
            if "drop" in ".".join(mods):
                b.count -= arrivals
            self.arrive(b, arrivals, int(mine[0]))
        if out is not None and out != "_":
            self.put(out, states, act)

    def arrive(self, b: MBarrier, arrivals: int, lane: int) -> None:
        """Count arrivals; more than the phase has room for is a fault."""
        b.pending -= arrivals
        if b.pending < 0:
            what = f"mbarrier over-arrived: {b.count - b.pending} arrivals of {b.count} in a phase"
            raise self.fault(what, lane, b.at % self.stride)
        self.try_complete(b)

    def _needs_init_seen(self, b: MBarrier, lanes: np.ndarray) -> None:
        """The initialisation must be ordered before this use."""
        g = b.at // self.m.grain
        rows = np.unique(self.row[lanes])
        writer, epoch = int(self.races.writer[g]), int(self.races.written[g])
        unseen = self.clocks.clock[rows, 0, writer] < epoch
        if unseen.any():
            lane = int(lanes[np.argmax(np.isin(self.row[lanes], rows[unseen]))])
            what = "mbarrier used without ordering after its initialisation"
            raise self.fault(what, lane, b.at % self.stride)

    def try_complete(self, b: MBarrier) -> None:
        """Flip the phase when all arrivals and bytes are there, and wake who waits for it."""
        if b.pending or b.tx:
            return
        b.phase += 1
        b.seen, b.clock, b.pending = b.clock, b.clock.copy(), b.count
        waiting, b.waiting = b.waiting, []
        for pc, mask in waiting:
            self.resume(pc, mask)

    def _wait(self, mods: list[str], args: list[str], lanes: np.ndarray, act: Mask) -> None:
        result = np.zeros(self.n, np.bool_)
        by_parity = "parity" in mods
        wanted = self.val(args[2], "u32" if by_parity else "u64")
        for b, mine in self._by_barrier(args[1], lanes):
            self._needs_init_seen(b, mine)
            want = wanted[mine]
            done = self._passed(b, want, by_parity)
            if b.copies and not done.all():
                copies, b.copies = b.copies, []
                for copy in copies:
                    copy()
                done = self._passed(b, want, by_parity)
            ready, late = mine[done], mine[~done]
            if len(ready):
                result[ready] = True
                rows = np.unique(self.row[ready])
                self._note_phase(b, ready)
                if "relaxed" not in mods:
                    self.clocks.acquire(rows, b.seen)
            if len(late):
                if mods[0] == "test_wait" or self.expired:
                    self.polled = True
                else:
                    mask = np.zeros(self.n, np.bool_)
                    mask[late] = True
                    b.waiting.append((self.pc, mask))
                    self.stop(mask)
        self.put(args[0], result, act)

    @staticmethod
    def _passed(b: MBarrier, want: np.ndarray, by_parity: bool) -> np.ndarray:
        """Whether the phase that each thread waits for is complete."""
        return (want & 1) != (b.phase & 1) if by_parity else want < b.phase

    def _note_phase(self, b: MBarrier, lanes: np.ndarray) -> None:
        """No thread waits for one phase twice.

        That it skips phases may be meant: of two consumers that take turns each skips the other's.
        """
        phase = b.phase - 1
        for lane in lanes.tolist():
            if b.last.get(lane) == phase and phase >= 0:
                what = f"mbarrier phase waited for twice: phase {phase}"
                raise self.fault(what, lane, b.at % self.stride)
            b.last[lane] = phase

    def waits(self) -> str:
        """Who waits for what, for the report of a deadlock."""
        out = []
        for (slot, bid), b in self.bars.items():
            name = f"barrier {bid}" if slot >= 0 else "cluster barrier"
            block = self.blocks[max(slot, 0)][1]
            out.append(f"{name} of block {block}: {b.arrived} of {b.expected} threads arrived")
        for m in self.mbars.values():
            if m.waiting or m.pending != m.count or m.tx:
                block = self.blocks[m.at // self.stride][1]
                out.append(
                    f"mbarrier {m.at % self.stride:#x} of block {block}: phase {m.phase}, "
                    f"{m.count - m.pending} of {m.count} arrivals, {m.tx} bytes missing"
                )
        return "; ".join(out)
