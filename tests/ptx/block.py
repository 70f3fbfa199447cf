"""One block: the scheduler that steps its threads and dispatches opcodes."""

from __future__ import annotations

import numpy as np

from .arithmetic import Arithmetic
from .async_copies import AsyncCopies
from .formats import PtxError
from .parser import Instr
from .registers import Mask
from .tensor_cores import TensorCores

# After one of these a thread that spun on an mbarrier may find it complete.
WAKING = ("mbarrier", "bar", "barrier", "cp", "bra")


class Cta(Arithmetic, AsyncCopies, TensorCores):
    """A block run to completion, one instruction of one group of threads at a time."""

    def run(self, max_steps) -> None:
        code, steps, yielded = (self.k.code, 0, set())
        while True:
            live = ~self.done
            if not live.any():
                break
            ready = live & (self.blocked < 0)
            if not ready.any():
                waited = sorted(set(self.blocked[live].tolist()))
                raise PtxError(
                    f"{self.k.name} block {self.cid}: deadlock; barriers waited on: {waited}"
                )
            pcs = np.unique(self.pc[ready])
            pick = next((p for p in pcs if p not in yielded), None)
            if pick is None:
                yielded.clear()
                pick = pcs[0]
            pick = int(pick)
            here = ready & (self.pc == pick)
            ins = code[pick]
            steps += 1
            self.step = steps
            if steps > max_steps:
                raise PtxError("step limit: a spin that never ends?")
            act = None if here.all() else here
            self.yield_ = False
            nxt = pick + 1
            if ins.pred is not None:
                p = self.raw(ins.pred) ^ bool(ins.neg)
                run = here & p
                self.pc[here] = nxt
                if run.any():
                    self.exec(ins, None if run.all() else run, pick)
            else:
                self.pc[here] = nxt
                self.exec(ins, act, pick)
            if self.yield_:
                yielded.add(pick + 1)
                yielded.add(pick)
            elif pick not in yielded and ins.op[0] in WAKING:
                yielded.clear()
            self_end = self.pc >= len(code)
            self.done |= self_end
        self.m.count["steps"] += steps

    def exec(self, ins: Instr, act: Mask, pc) -> None:
        if any(self.in_flight) and ins.op[0] != "wgmma":
            self.refuse_in_flight(ins, act)
        f = getattr(self, "op_" + ins.op[0].replace(".", "_"), None)
        if f is None:
            raise PtxError(f"line {ins.line}: opcode not known: {ins.text}")
        try:
            with np.errstate(all="ignore"):
                f(ins, ins.op[1:], ins.args, act)
        except PtxError:
            raise
        except Exception as e:
            raise PtxError(f"line {ins.line}: {ins.text}: {type(e).__name__}: {e}") from e

    def op_ret(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        self.done |= self.A(act)

    op_exit = op_ret

    def op_bra(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        self.pc[self.A(act)] = self.k.labels[args[0]]
