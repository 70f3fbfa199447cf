"""Warp-wide instructions: vote, shuffle, match, redux, elect."""

from __future__ import annotations

import numpy as np

from .barriers import Barriers
from .parser import Instr
from .registers import Mask

BITS = 1 << np.arange(32, dtype=np.uint64)
REDUCE = {
    "add": np.add,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


class WarpWide(Barriers):
    """Exchange between the lanes of a warp."""

    def op_elect(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        lanes = self.active(act).reshape(-1, 32)
        first = lanes.argmax(1)
        chosen = np.zeros(lanes.shape, np.bool_)
        chosen[np.arange(len(lanes)), first] = lanes.any(1)
        x, y = args[0].split("|")
        self.put(y, chosen.reshape(-1), act)
        self.put(x, np.repeat(first, 32).astype(np.uint32), act)

    def op_activemask(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        lanes = self.active(act).reshape(-1, 32)
        self.put(args[0], np.repeat((lanes * BITS).sum(1).astype(np.uint32), 32), act)

    def op_vote(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        active = self.active(act).reshape(-1, 32)
        true = (self.pval(args[1]) & self.active(act)).reshape(-1, 32)
        if "ballot" in mods:
            self.put(args[0], np.repeat((true * BITS).sum(1).astype(np.uint32), 32), act)
            return
        every, some = (true | ~active).all(1), true.any(1)
        result = {"any": some, "all": every, "uni": every | ~some}
        self.put(args[0], np.repeat(next(v for k, v in result.items() if k in mods), 32), act)

    def op_match(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        active = self.active(act).reshape(-1, 32)
        v = self.val(args[1], mods[-1]).reshape(-1, 32)
        same = (v[:, :, None] == v[:, None, :]) & active[:, None, :]
        if "any" in mods:
            self.put(args[0], (same * BITS).sum(2).astype(np.uint32).reshape(-1), act)
            return
        every = (same.sum(2) == active.sum(1)[:, None]).reshape(-1)
        names = args[0].split("|")
        mask = np.repeat((active * BITS).sum(1).astype(np.uint32), 32)
        self.put(names[0], np.where(every, mask, 0).astype(np.uint32), act)
        if len(names) > 1:
            self.put(names[1], every, act)

    def op_shfl(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        mode = next(q for q in mods if q in ("idx", "bfly", "up", "down"))
        v = self.val(args[1], "b32")
        b = self.val(args[2], "u32").astype(np.int64) & 31
        c = self.val(args[3], "u32").astype(np.int64)
        lane = self.lane.astype(np.int64)
        segment, clamp = c >> 8 & 31, c & 31
        low = lane & segment
        high = low | clamp & ~segment & 31
        j = {"idx": low | b & ~segment, "bfly": lane ^ b, "up": lane - b, "down": lane + b}[mode]
        ok = j >= low if mode == "up" else j <= high
        source = self.all_lanes // 32 * 32 + np.where(ok, j, lane)
        if act is not None and (bad := act & ~act[source]).any():
            raise self.fault("shuffle from a lane that does not take part", int(np.argmax(bad)))
        names = args[0].split("|")
        self.put(names[0], v[source], act)
        if len(names) > 1:
            self.put(names[1], ok, act)

    def op_redux(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        fn = REDUCE[mods[1]]
        v = self.val(args[1], mods[-1])
        if "abs" in mods:
            v = np.abs(v)
        if "NaN" in mods:
            fn = {"min": np.minimum, "max": np.maximum}[mods[1]]
        active = self.active(act).reshape(-1, 32)
        v = v.reshape(-1, 32)
        # Lanes that take no part repeat one that does (min, max, and, or); for sums they are zero.
        if mods[1] in ("add", "xor"):
            v = np.where(active, v, 0).astype(v.dtype)
        else:
            v = np.where(active, v, v[np.arange(len(v)), active.argmax(1)][:, None])
        self.put(args[0], np.repeat(fn.reduce(v, axis=1).astype(v.dtype), 32), act)
