"""Registers of a whole block: one numpy array a register, one element a thread."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

import numpy as np

from .formats import NP, RAW, WIDTH, PtxError
from .parser import Kernel, split_args
from .racecheck import RaceDetector

if TYPE_CHECKING:
    from .machine import Machine

POISON = 0xCD  # shared memory before its first write
Mask = np.ndarray | None


class Registers:
    """Thread state and operand access; every other part of a block builds on it."""

    def __init__(
        self,
        m: Machine,
        k: Kernel,
        cid: tuple[int, ...],
        grid: tuple[int, ...],
        block: tuple[int, ...],
        pv: dict[str, int],
        params: np.ndarray,
        smem: int,
    ) -> None:
        self.m, self.k, self.cid, self.grid = m, k, cid, grid
        self.number = self.step = 0
        self.last_write: dict[str, int] = {}  # step of a register's last ordinary write
        self.block, self.pv, self.params = block, pv, params
        self.n = n = block[0] * block[1] * block[2]
        if n % 32:
            raise PtxError("block must be a multiple of 32")
        dyn = -(-k.smem_static // 128) * 128
        if dyn:
            dyn = -(-dyn // 1024) * 1024
        self.dyn, self.smem = (dyn, np.full(dyn + smem, POISON, np.uint8))
        self.sinit = np.zeros(len(self.smem), np.bool_)
        self.r = {}
        t = np.arange(n)
        self.tid = [t % block[0], t // block[0] % block[1], t // (block[0] * block[1])]
        self.lane = (t % 32).astype(np.uint32)
        self.pc = np.zeros(n, np.int64)
        self.blocked = np.zeros(n, np.int64) - 1
        self.done = np.zeros(n, np.bool_)
        self.mbar, self.bars = ({}, {})
        self.async_groups = [collections.deque() for _ in range(n // 32)]
        self.pending = {}
        self.races = RaceDetector(n // 32, len(self.smem))
        groups = -(-n // 128)
        self.fenced = [0] * groups  # step of the last wgmma.fence
        self.committed = [0] * groups
        self.in_flight: list[dict[str, int]] = [{} for _ in range(groups)]
        self.synced = False  # has passed a global atomic: may read what other blocks wrote

    def raw(self, name: str):
        a = self.r.get(name)
        if a is None:
            ty = self.k.regs.get(name)
            if ty is None:
                raise PtxError(f"unknown register {name}")
            a = self.r[name] = np.zeros(self.n, RAW[WIDTH[ty]])
        return a

    def special(self, n):
        d = {"x": 0, "y": 1, "z": 2}
        if n.startswith("%tid."):
            return self.tid[d[n[-1]]].astype(np.uint32)
        for pre, v in (
            ("%ntid.", self.block),
            ("%ctaid.", self.cid),
            ("%nctaid.", self.grid),
            ("%clusterid.", self.cid),
            ("%nclusterid.", self.grid),
        ):
            if n.startswith(pre):
                return np.full(self.n, v[d[n[-1]]], np.uint32)
        if n.startswith(("%cluster_ctaid", "%cluster_ctarank")):
            return np.zeros(self.n, np.uint32)
        if n == "%laneid":
            return self.lane
        if n == "%warpid":
            return (np.arange(self.n) // 32).astype(np.uint32)
        return None

    def val(self, a, ty: str):
        """operand a as an array of type ty (whole CTA)"""
        dt = NP[ty]
        if a[0] == "%" or a in self.k.regs:
            sp = self.special(a)
            v = sp if sp is not None else self.raw(a)
            w = np.dtype(dt).itemsize
            if v.dtype.itemsize == w:
                return v.view(dt)
            return v.astype(RAW[w]).view(dt)
        if a.startswith("0f"):
            return (
                np.full(self.n, int(a[2:], 16), np.uint32).view(np.float32).astype(dt)
                if dt == np.float32
                else np.full(self.n, int(a[2:], 16), np.uint32).view(dt)
            )
        if a.startswith("0d"):
            return np.full(self.n, int(a[2:], 16), np.uint64).view(np.float64)
        if a in self.k.shared:
            o = self.k.shared[a]
            o = self.dyn if o == "dyn" else o
            return np.full(self.n, o, dt)
        if a in self.pv:
            return np.full(self.n, self.pv[a], dt)
        try:
            i = int(a.rstrip("U"), 0)
        except ValueError:
            raise PtxError(f"operand {a!r}?") from None
        w = np.dtype(dt).itemsize
        if np.dtype(dt).kind == "f":
            return np.full(self.n, i & (1 << 8 * w) - 1, RAW[w]).view(dt)
        return np.full(self.n, i & (1 << 8 * w) - 1, RAW[w]).view(dt)

    def pval(self, a):
        if a.startswith("!"):
            return ~self.raw(a[1:])
        if a in ("1", "0", "-1"):
            return np.full(self.n, a != "0")
        return self.raw(a)

    def put(self, name: str, v, act: Mask) -> None:
        if name == "_":
            return
        self.last_write[name] = self.step
        d = self.raw(name)
        w = d.dtype.itemsize
        v = np.asarray(v)
        if d.dtype == np.bool_:
            v = v.astype(np.bool_)
        else:
            if v.dtype.itemsize != w:
                v = v.astype(
                    np.int64
                    if v.dtype.kind == "i" and w == 8
                    else {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[w]
                    if v.dtype.kind == "i"
                    else d.dtype
                )
            v = np.ascontiguousarray(v).view(d.dtype)
        if act is None:
            self.r[name] = v.copy() if v.base is not None or v is not None else v
        else:
            d = d.copy()
            d[act] = v[act]
            self.r[name] = d

    def A(self, act: Mask):
        return np.ones(self.n, np.bool_) if act is None else act

    def vec(self, txt):
        return split_args(txt[1:-1]) if txt[0] == "{" else [txt]
