"""mbarriers, block barriers, and the warp-wide vote, shuffle and elect."""

from __future__ import annotations

import numpy as np

from .formats import SBASE, PtxError
from .memory import Memory
from .parser import Instr
from .registers import Mask


class Barriers(Memory):
    """Everything by which threads wait for each other."""

    def mb(self, addr: np.ndarray):
        return self.mbar[int(np.where(addr >= SBASE, addr - SBASE, addr))]

    def mb_try(self, b) -> None:
        if b["pend"] == 0 and b["tx"] == 0:
            b["phase"] ^= 1
            b["seen"] = b["clock"].copy()
            b["pend"] = b["count"]

    def op_mbarrier(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        L = np.nonzero(self.A(act))[0]
        if mods[0] == "init":
            for thread in L:
                ad = int(self.addr(args[0])[thread])
                ad = ad - SBASE if ad >= SBASE else ad
                c = int(self.val(args[1], "u32")[thread])
                self.mbar[ad] = {"count": c, "pend": c, "tx": 0, "phase": 0}
                self.mbar[ad]["clock"] = self.races.fresh()
                self.mbar[ad]["seen"] = self.races.fresh()
        elif mods[0] in ("arrive", "expect_tx"):
            dst = None if args[0][0] == "[" else args[0]
            ar = args if dst is None else args[1:]
            ad = self.addr(ar[0])
            for thread in L:
                b = self.mb(ad[thread])
                if "expect_tx" in mods:
                    b["tx"] += int(self.val(ar[1], "u32")[thread])
                if mods[0] == "arrive":
                    self.races.release(thread // 32, b["clock"])
                    b["pend"] -= (
                        int(self.val(ar[1], "u32")[thread])
                        if len(ar) > 1 and "expect_tx" not in mods
                        else 1
                    )
                    if b["pend"] < 0:
                        raise PtxError(f"line {ins.line}: mbarrier over-arrived: {ins.text}")
                self.mb_try(b)
        elif mods[0] in ("try_wait", "test_wait"):
            r = np.zeros(self.n, bool)
            ad = self.addr(args[1])
            par = self.val(args[2], "u32")
            if "parity" not in mods:
                raise PtxError(ins.text)
            for thread in L:
                b = self.mb(ad[thread])
                r[thread] = b["phase"] != int(par[thread]) & 1
                if r[thread]:
                    self.races.acquire(thread // 32, b["seen"])
            self.put(args[0], r, act)
            if not r[L].all():
                self.yield_ = True
        elif mods[0] == "inval":
            pass
        else:
            raise PtxError(ins.text)

    def op_fence(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        pass

    op_membar = op_fence

    op_griddepcontrol = op_fence

    op_setmaxnreg = op_fence

    op_prefetch = op_fence

    op_nanosleep = op_fence

    op_prefetchu = op_fence

    def op_elect(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        A = self.A(act)
        p = np.zeros(self.n, bool)
        d = np.zeros(self.n, np.uint32)
        for w in range(self.n // 32):
            thread = np.nonzero(A[32 * w : 32 * w + 32])[0]
            if len(thread):
                p[32 * w + thread[0]] = True
                d[32 * w : 32 * w + 32] = thread[0]
        x, y = args[0].split("|")
        self.put(y, p, act)
        self.put(x, d, act)

    def op_bar(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if "warp" in mods:
            return
        bid = int(self.val(args[0], "u32")[np.nonzero(self.A(act))[0][0]])
        cnt = (
            int(self.val(args[1], "u32")[np.nonzero(self.A(act))[0][0]])
            if len(args) > 1
            else self.n
        )
        A = self.A(act)
        b = self.bars.setdefault(bid, {"arrived": 0, "waiting": np.zeros(self.n, bool)})
        clock = b.setdefault("clock", self.races.fresh())
        for warp in np.unique(np.nonzero(A)[0] // 32):
            self.races.release(warp, clock)
        b["arrived"] += int(A.sum())
        if "arrive" not in mods:
            b["waiting"] |= A
            self.blocked[A] = bid
        if b["arrived"] > cnt:
            raise PtxError(f"line {ins.line}: barrier {bid} got {b['arrived']} arrivals of {cnt}")
        if b["arrived"] == cnt:
            self.blocked[b["waiting"]] = -1
            for warp in np.unique(np.nonzero(b["waiting"])[0] // 32):
                self.races.acquire(warp, clock)
            del self.bars[bid]
        self.m.count["barriers"] += 1

    op_barrier = op_bar

    def op_activemask(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        A = self.A(act).reshape(-1, 32)
        m = (A * (1 << np.arange(32, dtype=np.uint64))).sum(1).astype(np.uint32)
        self.put(args[0], np.repeat(m, 32), act)

    def op_vote(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        p = self.pval(args[1]) & self.A(act)
        P = p.reshape(-1, 32)
        A = self.A(act).reshape(-1, 32)
        if "ballot" in mods:
            self.put(
                args[0],
                np.repeat((P * (1 << np.arange(32, dtype=np.uint64))).sum(1).astype(np.uint32), 32),
                act,
            )
        else:
            self.put(args[0], np.repeat(P.any(1) if "any" in mods else (P | ~A).all(1), 32), act)

    def op_shfl(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        mode = next(q for q in mods if q in ("idx", "bfly", "up", "down"))
        v = self.val(args[1], "b32")
        b = self.val(args[2], "u32").astype(np.int64)
        c = self.val(args[3], "u32").astype(np.int64)
        lane = self.lane.astype(np.int64)
        seg, cl = (c >> 8 & 31, c & 31)
        lo = lane & seg
        hi = lo | cl & ~seg & 31
        j = {"idx": lo | b & ~seg & 31, "bfly": lane ^ b, "up": lane - b, "down": lane + b}[mode]
        ok = j >= lo if mode == "up" else j <= hi
        j = np.where(ok, j, lane)
        w = np.arange(self.n) // 32 * 32
        d = args[0].split("|")
        self.put(d[0], v[w + j], act)
        if len(d) > 1:
            self.put(d[1], ok, act)

    def op_redux(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        fn = {
            "add": np.add,
            "min": np.fmin,
            "max": np.fmax,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[mods[1]]
        self.whole_warps(ins, act)
        v = self.val(args[1], mods[-1])
        if "abs" in mods:
            v = np.abs(v)
        r = fn.reduce(v.reshape(-1, 32), axis=1).astype(v.dtype)
        self.put(args[0], np.repeat(r, 32), act)

    def whole_warps(self, ins: Instr, act: Mask) -> None:
        """Refuse a collective instruction that part of a warp reaches alone."""
        lanes = self.A(act).reshape(-1, 32)
        if (lanes.any(1) & ~lanes.all(1)).any():
            raise self.fault(ins, "collective instruction with part of a warp")
