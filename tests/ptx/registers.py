"""Registers of a wave of blocks: one numpy array a register, one element a thread.

A wave is a set of co-resident blocks laid side by side, so one numpy operation executes an
instruction for every thread of every block that has reached it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import NP, RAW, WIDTH, PtxError
from .parser import Instr, Kernel, split_args

if TYPE_CHECKING:
    from .machine import Machine

Mask = np.ndarray | None  # bool per thread; None: all of them
Ids = tuple[int, int, int]
DTYPE = {ty: np.dtype(kind) for ty, kind in NP.items()}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclasses.dataclass
class Launch:
    """What is the same for every block of a launch."""

    grid: Ids
    block: Ids
    cluster: Ids
    params: np.ndarray  # the parameter space as bytes
    offsets: dict[str, int]  # of a parameter in it
    smem: int  # dynamic shared memory, bytes
    variables: dict[str, int]  # addresses of module variables


class Registers:
    """Thread state and operand access; every other part of a wave builds on it."""

    def __init__(
        self, m: Machine, k: Kernel, launch: Launch, blocks: list[tuple[int, Ids]]
    ) -> None:
        self.m, self.k, self.launch, self.blocks = m, k, launch, blocks
        self.pv, self.params = launch.offsets, launch.params
        bx, by, bz = launch.block
        self.per = per = bx * by * bz  # threads of a block
        if per % 32:
            raise PtxError(f"{k.name}: a block of {per} threads is not a whole number of warps")
        self.n = n = per * len(blocks)
        self.warps = per // 32
        self.step = 0
        self.static = -(-k.smem_static // 1024) * 1024 if k.smem_static else 0
        # Shared bytes that a block owns; dynamic memory begins behind the static variables.
        self.limit = self.static + launch.smem if launch.smem else k.smem_static
        self.stride = -(-self.limit // 1024) * 1024
        self.smem = np.full(self.stride * len(blocks), 0xCD, np.uint8)
        self.slot = np.repeat(np.arange(len(blocks)), per)
        self.base = self.slot * self.stride
        t = np.tile(np.arange(per), len(blocks))
        self.thread = t
        self.tid = [t % bx, t // bx % by, t // (bx * by)]
        self.lane = (t % 32).astype(np.uint32)
        self.all_lanes = np.arange(n)
        self.alive = np.ones(n, np.bool_)
        self.r: dict[str, np.ndarray] = {}
        self.undefined: dict[str, np.ndarray] = {}  # registers that some threads never wrote
        self.act: Mask = None
        self.ins: Instr = k.code[0]
        self.constants: dict[tuple[str, str], np.ndarray] = {}
        self.specials: dict[str, np.ndarray] = {}
        groups = max(1, n // 128)
        self.written_at: dict[str, np.ndarray] = {
            q: np.zeros(groups, np.int64)
            for ins in k.code if ins.op[:2] == ["wgmma", "mma_async"]
            for q in ins.words if q in k.regs
        }  # fmt: skip

    def prepare(self) -> None:
        """State of a run; called by the scheduler before the first instruction."""

    def block_ends(self, slot: int) -> None:
        """A block's last thread has exited."""

    def fault(self, what: str, at: Any = None, address: int | None = None) -> PtxError:
        """The error for the current instruction, `at` naming a thread (index into the wave)."""
        ins, thread = self.ins, None
        if at is None:
            threads = self.all_lanes if self.act is None else np.nonzero(self.act)[0]
            at = threads[0] if len(threads) else 0
        slot, thread = divmod(int(at), self.per)
        return PtxError(
            what, kernel=self.k.name, block=self.blocks[slot][1], thread=thread, line=ins.line,
            source=ins.source, address=address, text=ins.text,
        )  # fmt: skip

    def raw(self, name: str) -> np.ndarray:
        """Register `name` as stored; a thread that never wrote it may not read it."""
        a = self.r.get(name)
        if a is None:
            if name not in self.k.regs:
                raise self.fault(f"unknown operand {name!r}")
            raise self.fault(f"read of register {name}, which was never written")
        if self.undefined and name in self.undefined:
            self._refuse_undefined(name)
        return a

    def _refuse_undefined(self, name: str) -> None:
        bad = self.undefined[name] if self.act is None else self.undefined[name] & self.act
        if bad.any():
            who = int(np.argmax(bad))
            raise self.fault(f"read of register {name}, which this thread never wrote", who)

    def old(self, name: str) -> np.ndarray:
        """Register `name` before a partial write; zeros if it has none yet."""
        a = self.r.get(name)
        if a is None:
            ty = self.k.regs.get(name)
            if ty is None:
                raise self.fault(f"unknown register {name!r}")
            a = np.zeros(self.n, RAW[WIDTH[ty]])
        return a

    def special(self, name: str) -> np.ndarray | None:
        """The value of a special register such as %tid.x, or None."""
        v = self.specials.get(name)
        if v is None:
            v = self._special(name)
            if v is not None:
                v = np.ascontiguousarray(v).astype(np.uint32)
                self.specials[name] = v
        return v

    def _special(self, name: str) -> np.ndarray | None:
        head, _, axis = name.partition(".")
        d = "xyz".find(axis) if axis else -1
        per_block = np.array([cid for _, cid in self.blocks])[self.slot]
        grid, block, cluster = (
            np.array(v) for v in (self.launch.grid, self.launch.block, self.launch.cluster)
        )
        inside, full = per_block % cluster, np.ones(self.n, np.int64)
        table = {
            "%tid": lambda: self.tid[d],
            "%ntid": lambda: full * block[d],
            "%ctaid": lambda: per_block[:, d],
            "%nctaid": lambda: full * grid[d],
            "%clusterid": lambda: per_block[:, d] // cluster[d],
            "%nclusterid": lambda: full * (grid[d] // cluster[d]),
            "%cluster_ctaid": lambda: inside[:, d],
            "%cluster_nctaid": lambda: full * cluster[d],
            "%cluster_ctarank": lambda: (
                inside[:, 0] + cluster[0] * (inside[:, 1] + cluster[1] * inside[:, 2])
            ),
            "%cluster_nctarank": lambda: full * cluster.prod(),
            "%is_explicit_cluster": lambda: full * int(cluster.prod() > 1),
            "%laneid": lambda: self.lane,
            "%warpid": lambda: self.thread // 32,
            "%nwarpid": lambda: full * self.warps,
            "%smid": lambda: self.slot,
            "%nsmid": lambda: full * len(self.blocks),
            "%clock": lambda: full * self.step,
            "%clock_hi": lambda: full * 0,
            "%globaltimer_lo": lambda: full * self.step,
            "%dynamic_smem_size": lambda: full * self.launch.smem,
            "%total_smem_size": lambda: full * self.limit,
            "%lanemask_lt": lambda: (1 << self.lane.astype(np.int64)) - 1,
            "%lanemask_le": lambda: (2 << self.lane.astype(np.int64)) - 1,
            "%lanemask_eq": lambda: 1 << self.lane.astype(np.int64),
            "%lanemask_ge": lambda: (1 << 32) - (1 << self.lane.astype(np.int64)),
            "%lanemask_gt": lambda: (1 << 32) - (2 << self.lane.astype(np.int64)),
        }
        return table[head]() if head in table else None

    def val(self, a: str, ty: str) -> np.ndarray:
        """Operand `a` (register, constant, variable) of every thread as an array of type `ty`."""
        v = self.r.get(a)
        if v is None:
            return self._constant(a, ty)
        if self.undefined and a in self.undefined:
            self._refuse_undefined(a)
        dt = DTYPE[ty]
        if v.dtype == dt:
            return v
        if v.dtype.itemsize == dt.itemsize:
            return v.view(dt)
        return v.astype(RAW[dt.itemsize]).view(dt)

    def _constant(self, a: str, ty: str) -> np.ndarray:
        v = self.constants.get((a, ty))
        if v is not None:
            return v
        if a in self.k.regs:
            return self.raw(a)  # raises: it was never written
        dt = DTYPE[ty]
        if a[0] == "%" and (sp := self.special(a)) is not None:
            v = sp.astype(RAW[dt.itemsize]).view(dt)
            if a.startswith(("%clock", "%globaltimer")):
                self.specials.pop(a)
                return v
        else:
            v = np.full(self.n, self._scalar(a), RAW[dt.itemsize]).view(dt)
            if a.startswith("0f") and dt == np.float64:
                v = np.full(self.n, int(a[2:], 16), np.uint32).view(np.float32).astype(dt)
        v.setflags(write=False)
        self.constants[a, ty] = v
        return v

    def _scalar(self, a: str) -> Any:
        if a.startswith(("0f", "0F", "0d", "0D")):
            return int(a[2:], 16)
        if a in self.k.shared:
            offset = self.k.shared[a]
            return self.static if offset == "dyn" else offset
        if a in self.pv:
            return self.pv[a]
        if a in self.launch.variables:
            return self.launch.variables[a]
        try:
            number = int(a.rstrip("U"), 0)
        except ValueError:
            raise self.fault(f"operand {a!r} not understood") from None
        return np.uint64(number & (1 << 64) - 1)

    def pval(self, a: str) -> np.ndarray:
        """Operand `a` as a predicate."""
        if a[0] == "!":
            return ~self.raw(a[1:])
        if a[0] != "%" and a not in self.k.regs:
            return np.full(self.n, int(a, 0) != 0)
        return self.raw(a)

    def put(self, name: str, v: np.ndarray, act: Mask) -> None:
        """Write `v` to the threads of `act`. Stored arrays are never changed in place."""
        if name == "_":
            return
        ty = self.k.regs.get(name)
        if ty is None:
            raise self.fault(f"unknown register {name!r}")
        dt = RAW[WIDTH[ty]]
        w = WIDTH[ty]
        v = np.asarray(v)
        if w == 0:
            v = v.astype(np.bool_, copy=False)
        else:
            if v.dtype.itemsize != w:
                v = v.astype(SIGNED[w] if v.dtype.kind == "i" else dt)
            if not v.flags.c_contiguous:
                v = np.ascontiguousarray(v)
            v = v.view(dt)
        if self.written_at and name in self.written_at:
            self._remember_write(name, act)
        if act is None:
            self.r[name] = v
            if self.undefined:
                self.undefined.pop(name, None)
            return
        d = self.r.get(name)
        if d is None:
            self.r[name] = np.where(act, v, np.zeros(1, dt))
            self.undefined[name] = ~act
            return
        self.r[name] = np.where(act, v, d)
        if name in self.undefined:
            left = self.undefined[name] & ~act
            if left.any():
                self.undefined[name] = left
            else:
                del self.undefined[name]

    def _remember_write(self, name: str, act: Mask) -> None:
        if act is None:
            self.written_at[name][:] = self.step
        else:
            groups = len(self.written_at[name])
            self.written_at[name][act.reshape(groups, -1).any(1)] = self.step

    def active(self, act: Mask) -> np.ndarray:
        """`act` as a mask."""
        return self.alive if act is None else act

    def lanes(self, act: Mask) -> np.ndarray:
        """Indices of the threads in `act`."""
        return self.all_lanes if act is None else np.nonzero(act)[0]

    def vec(self, text: str) -> list[str]:
        """The registers of a vector operand `{...}`, or the one operand."""
        return split_args(text[1:-1]) if text[0] == "{" else [text]
