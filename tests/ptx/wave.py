"""The scheduler: runs the threads of a wave of blocks, in step or in another order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .arithmetic import Arithmetic
from .bits import Bits
from .formats import PtxError
from .parser import Instr
from .registers import Mask
from .tcgen05 import Tcgen05
from .tensormaps import TensorCopies

ALIGNED = {
    "mma", "ldmatrix", "stmatrix", "movmatrix", "wgmma", "redux", "setmaxnreg", "elect", "shfl",
    "vote", "match",
}  # fmt: skip
WITH_MASK = {"shfl", "vote", "match", "redux", "elect"}
NOTHING = {"nanosleep", "prefetch", "prefetchu", "discard", "applypriority"}
POLLS = 100  # rounds in which every thread that can run only polls, until that is a livelock


def is_collective(ins: Instr) -> bool:
    """Whether all (named) lanes of a warp must execute `ins` together."""
    op = ins.op
    if op[0] in ("bar", "barrier"):
        return "cluster" not in op and not (op[0] == "barrier" and "aligned" not in op)
    return op[0] in ALIGNED or (op[0] == "tcgen05" and "aligned" in op)


class Wave(Arithmetic, Bits, Tcgen05, TensorCopies):
    """Co-resident blocks, run to completion.

    `groups` maps a pc to the threads that can run there. In step (`order="lockstep"`) the lowest
    pc runs first, so threads that parted meet again where their paths do.
    """

    def bursts(self, max_steps: int, order: str, rng: np.random.Generator) -> Iterator[None]:
        """Runs to the end, and yields where another wave may run."""
        self.bars, self.mbars, self.columns, self.initialised = {}, {}, {}, {}
        self.leave, self.expired = None, False
        self.groups: dict[int, np.ndarray] = {0: np.ones(self.n, np.bool_)}
        self.parked: dict[int, np.ndarray] = {}
        self.held: dict[int, np.ndarray] = {}
        self.polls = 0
        self.order, self.rng, self.turn = order, rng, 0
        self.prepare()
        for ins in self.k.code:
            if ins.fn is None:
                ins.fn = "op_" + ins.op[0]
                ins.collective = is_collective(ins)
        while True:
            with np.errstate(all="ignore"):
                if not self.groups and not self.wake():
                    break
                self.burst(*self.pick())
            if self.step > max_steps:
                raise self.fault("step limit: a loop that never ends?")
            yield
        self.check_end()
        self.m.count["steps"] += self.step

    # ---- choosing -----------------------------------------------------------------------------

    def pick(self) -> tuple[int, np.ndarray, int]:
        """(pc, threads, how many instructions they may run)."""
        if self.order == "lockstep":
            pc = min(self.groups)
            return pc, self.groups.pop(pc), 1 << 60
        warps = {pc: mask.reshape(-1, 32).any(1) for pc, mask in self.groups.items()}
        ready = np.nonzero(np.stack(list(warps.values())).any(0))[0]
        budget = 1 << 60
        if self.order == "reverse":
            chosen = ready[-1:]
        elif self.order == "round_robin":
            chosen = ready[ready > self.turn][:1]
            chosen = chosen if len(chosen) else ready[:1]
            self.turn, budget = int(chosen[0]), 24
        else:
            chosen = ready[self.rng.random(len(ready)) < self.rng.choice([0.1, 0.5, 0.9])]
            chosen = chosen if len(chosen) else self.rng.choice(ready, 1)
            budget = int(self.rng.integers(1, 200))
        # Lanes of a warp that parted: the lowest pc first, as ever.
        pc = min(pc for pc, there in warps.items() if there[chosen].any())
        take = np.zeros(len(warps[pc]), np.bool_)
        take[chosen] = True
        mask = self.groups.pop(pc)
        mine = mask & np.repeat(take, 32)
        rest = mask & ~mine
        if rest.any():
            self.groups[pc] = rest
        return pc, mine, budget

    def resume(self, pc: int, mask: np.ndarray) -> None:
        there = self.groups.get(pc)
        self.groups[pc] = mask if there is None else there | mask
        self.progress += 1

    def wake(self) -> bool:
        """Nothing can run: finish copies, let waits time out, or report why nothing moves."""
        for b in list(self.mbars.values()):
            if b.waiting and b.copies:
                copies, b.copies = b.copies, []
                for copy in copies:
                    copy()
        if self.groups:
            self.polls = 0
            return True
        waiting = [b for b in self.mbars.values() if b.waiting]
        if not self.parked and not waiting:
            if self.held:
                pc, mask = next(iter(self.held.items()))
                self.ins, self.act = self.k.code[pc], mask
                raise self.fault("collective instruction reached by part of a warp (divergent)")
            if self.bars:
                self._deadlock()
            return False
        self.polls = self.polls + 1 if self.progress == self.last_progress else 0
        if self.polls > POLLS:
            self._deadlock()
        for pc, mask in self.parked.items():
            self.resume(pc, mask)
        self.parked = {}
        if not self.groups:
            self.expired = True
            for b in waiting:
                again, b.waiting = b.waiting, []
                for pc, mask in again:
                    self.resume(pc, mask)
        self.last_progress = self.progress
        return True

    last_progress = 0

    def _deadlock(self) -> None:
        stuck = self.waits() or "every thread that can run polls a flag that no one sets"
        for groups in (self.parked, self.held):
            for pc, mask in groups.items():
                self.ins, self.act = self.k.code[pc], mask
        waiting = [(pc - 1, mask) for b in self.bars.values() for pc, mask in b.waiting]
        waiting += [at for m in self.mbars.values() for at in m.waiting]
        if waiting:
            pc, mask = waiting[-1]
            self.ins, self.act = self.k.code[pc], mask
        raise self.fault(f"deadlock: {stuck}")

    # ---- running ------------------------------------------------------------------------------

    def burst(self, pc: int, mask: np.ndarray, budget: int) -> None:
        """Run `mask` from `pc` until it meets another group, parts, waits or ends."""
        code, groups, counters = self.k.code, self.groups, self.m.counters
        end = len(code)
        count = int(np.count_nonzero(mask))
        full = count == self.n
        while True:
            if pc >= end:
                self._exit(mask)
                return
            ins = code[pc]
            self.ins, self.pc, self.leave = ins, pc, None
            self.step += 1
            budget -= 1
            act: Mask = None if full else mask
            self.act = act
            runs = True
            if ins.pred is not None:
                p = self.raw(ins.pred)
                p = ~p if ins.neg else p
                act = p if full else p & mask
                hits = int(np.count_nonzero(act))
                runs = hits > 0
                if hits == self.n:
                    act = None
                self.act = act
            if runs and ins.collective and (act is not None or pc in self.held):
                act, mask = self._gather(ins, pc, act, mask)
                full = bool(mask.all())
                self.act = act
                runs = act is None or bool(act.any())
            if runs:
                counters.executed(pc, act)
                self.execute(ins, act)
            if self.leave is not None:
                mask = mask & ~self.leave
                full = False
                if not mask.any():
                    return
            pc += 1
            if budget <= 0 or pc in groups:
                self.resume(pc, mask)
                return

    def execute(self, ins: Instr, act: Mask) -> None:
        if self.flying and ins.op[0] != "wgmma" and not self.flying.isdisjoint(ins.words):
            self.refuse_flying(ins, act)
        fn = getattr(self, ins.fn, None)
        if fn is None:
            if ins.op[0] in NOTHING:
                return
            raise self.fault(f"opcode not known: {ins.text}")
        try:
            fn(ins, ins.op[1:], ins.args, act)
        except PtxError:
            raise
        except Exception as e:
            raise self.fault(f"{type(e).__name__}: {e}") from e

    def _gather(self, ins: Instr, pc: int, act: Mask, mask: np.ndarray) -> tuple[Mask, np.ndarray]:
        """A collective waits until all its lanes are there; those of incomplete warps are held."""
        act = self.active(act)
        if pc in self.held:
            back = self.held.pop(pc)
            act, mask = act | back, mask | back
        need = self.alive
        if ins.op[0] in WITH_MASK or ins.op[:2] == ["bar", "warp"]:
            self.act = act
            members = self.val(ins.args[-1], "u32")
            if not (members[act] == 0xFFFFFFFF).all():
                per_warp = np.zeros(self.n // 32, np.uint32)
                np.maximum.at(per_warp, self.row[act], members[act])
                need = need & (per_warp[self.row] >> self.lane & 1).astype(np.bool_)
        unit = 128 if ins.op[0] == "wgmma" and self.per % 128 == 0 else 32
        missing = (need & ~act).reshape(-1, unit).any(1) & act.reshape(-1, unit).any(1)
        if missing.any():
            skipped = (need & mask & ~act).reshape(-1, unit).any(1) & missing
            if ins.pred is not None and skipped.any():
                what = "collective instruction executed by part of a warp (divergent)"
                raise self.fault(what, int(np.argmax(skipped)) * unit)
            hold = act & np.repeat(missing, unit)
            self.held[pc] = hold
            act = act & ~hold
            mask = mask & ~hold
            if not mask.any():
                self.leave = np.ones(self.n, np.bool_)
        return (None if act.all() else act), mask

    def _exit(self, mask: np.ndarray) -> None:
        self.alive = self.alive & ~mask
        slots = np.unique(self.slot[mask])
        gone = slots[~self.alive.reshape(-1, self.per)[slots].any(1)]
        for slot in gone.tolist():
            self.block_ends(slot)
        self.threads_exited(slots)

    def check_end(self) -> None:
        """Faults that show only when every thread has exited."""

    # ---- control flow -------------------------------------------------------------------------

    def op_ret(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        mask = self.active(act)
        self.stop(mask)
        self._exit(mask)

    op_exit = op_ret

    def op_setmaxnreg(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        count = int(args[0], 0)
        if count % 8 or not 24 <= count <= 256:
            raise self.fault(f"setmaxnreg of {count}: not a multiple of 8 in 24..256")

    def op_trap(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        raise self.fault("trap executed (a failed device assertion)")

    def op_bra(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        mask = self.active(act)
        self.stop(mask)
        if ins.target <= self.pc and self.polled:
            self.polled = False
            there = self.parked.get(ins.target)
            self.parked[ins.target] = mask if there is None else there | mask
        else:
            progress = self.progress
            self.resume(ins.target, mask)
            self.progress = progress
