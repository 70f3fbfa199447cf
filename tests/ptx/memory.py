"""Loads, stores and atomics with their bounds, alignment and initialisation checks."""

from __future__ import annotations

import re

import numpy as np

from .formats import GBASE, NP, SBASE, WIDTH, PtxError, bf16_to_f32, f32_to_bf16
from .parser import Instr, split_args
from .registers import Mask, Registers

ATOMIC = {
    "add": lambda old, new: old + new,
    "exch": lambda old, new: new,
    "max": max,
    "min": min,
    "or": lambda old, new: old | new,
    "and": lambda old, new: old & new,
    "xor": lambda old, new: old ^ new,
    "inc": lambda old, new: old + 1 if old < new else old * 0,
}


class Memory(Registers):
    """Global, shared and parameter space."""

    def addr(self, a):
        a = a.strip()[1:-1].strip()
        m = re.match("(.+?)\\s*\\+\\s*(-?\\w+)$", a)
        off = 0
        if m:
            a, off = (m.group(1).strip(), int(m.group(2), 0))
        if a in self.k.shared:
            o = self.k.shared[a]
            base = np.full(self.n, self.dyn if o == "dyn" else o, np.int64)
        elif a in self.pv:
            base = np.full(self.n, self.pv[a], np.int64)
        else:
            r = self.raw(a)
            base = r.astype(np.int64)
        return base + off

    def space(self, addr: np.ndarray, sp: str, what, ins: Instr):
        """(array, index, is_shared) of a state space"""
        if sp == "generic":
            sh = (addr >= SBASE) & (addr < GBASE)
            if sh.all():
                return (self.smem, addr - SBASE, True)
            if sh.any():
                raise PtxError(f"{ins.text}: lanes in two spaces")
            return (self.m.mem, addr - GBASE, False)
        if sp == "shared":
            return (self.smem, np.where(addr >= SBASE, addr - SBASE, addr), True)
        return (self.m.mem, addr - GBASE, False)

    def fault(self, ins: Instr, what: str) -> PtxError:
        """The error to raise: kernel, block, PTX line, the fault, and the instruction."""
        return PtxError(f"{self.k.name} block {self.cid} line {ins.line}: {what}: {ins.text}")

    def check(
        self, arr: np.ndarray, idx: np.ndarray, size: int, shared: bool, ins: Instr, write: bool
    ) -> None:
        """Refuse misaligned, out-of-bounds and uninitialised accesses of `size` bytes at `idx`."""
        if idx.size == 0:
            return
        if (idx % size).any():
            raise self.fault(ins, f"misaligned {size}-byte access")
        low, high = int(idx.min()), int(idx.max()) + size
        if low < 0 or high > len(arr):
            space = "shared" if shared else "global"
            raise self.fault(ins, f"out of bounds {space} access {low:#x}..{high:#x}")
        full = idx[:, None] + np.arange(size)
        if shared:
            if write:
                self.sinit[full] = True
            elif not self.sinit[full].all():
                bad = int(full[~self.sinit[full]][0])
                raise self.fault(ins, f"read of uninitialised shared memory at {bad:#x}")
            return
        if not self.m.ok[full].all():
            bad = int(full[~self.m.ok[full]][0])
            raise self.fault(ins, f"global access outside every allocation at {bad:#x}")
        if not self.synced:
            owner, me = self.m.owner[full], self.number
            if ((owner != 0) & (owner != me)).any():
                bad = int(full[(owner != 0) & (owner != me)][0])
                raise self.fault(ins, f"global race: another block wrote {bad:#x} in this launch")
        if write:
            self.m.owner[full] = self.number
        if write:
            self.m.init[full] = True
        elif not self.m.init[full].all():
            bad = int(full[~self.m.init[full]][0])
            raise self.fault(ins, f"read of uninitialised global memory at {bad:#x}")

    def shared_access(
        self, ins: Instr, idx: np.ndarray, warps: np.ndarray, size: int, data: np.ndarray | None
    ) -> None:
        """Race-check `size` bytes at each `idx` by `warps`; `data` [n, size] is what is written."""
        at = (idx[:, None] + np.arange(size)).reshape(-1)
        by = np.repeat(warps, size)
        if data is None:
            found = self.races.read(at, by)
        else:
            new = np.ascontiguousarray(data).reshape(-1)
            found = self.races.write(at, by, new != self.smem[at])
            self.smem[at] = new
            # Two warps of this very instruction: one value survives, the other must equal it.
            lost = self.smem[at] != new
            if found is None and lost.any():
                found = f"shared-memory race: two writers of {int(at[np.argmax(lost)]):#x} at once"
        if found:
            raise self.fault(ins, found)

    def count_access(
        self, idx: np.ndarray, lanes: np.ndarray, size: int, shared: bool, write: bool
    ) -> None:
        c = self.m.count
        w = lanes // 32
        for wi in np.unique(w):
            a = idx[w == wi]
            if shared:
                per = max(1, 32 // max(1, size // 4)) if size > 4 else 32
                for q in range(0, len(a), per):
                    g = a[q : q + per]
                    words = np.unique((g[:, None] + np.arange(0, max(size, 4), 4)).reshape(-1) // 4)
                    b = np.bincount(words % 32, minlength=32).max()
                    c["smem_wavefronts"] += int(b)
                    c["smem_ideal"] += 1
            else:
                sec = np.unique((a[:, None] + np.arange(0, size, min(size, 32))).reshape(-1) // 32)
                c["gl_st_sectors" if write else "gl_ld_sectors"] += len(sec)
                c["gl_st_bytes" if write else "gl_ld_bytes"] += len(a) * size

    def load(self, ins: Instr, sp: str, addr: np.ndarray, size: int, act: Mask):
        idx_l = np.arange(self.n) if act is None else np.nonzero(act)[0]
        if sp == "param":
            out = np.zeros((self.n, size), np.uint8)
            out[idx_l] = self.params[addr[idx_l][:, None] + np.arange(size)]
            return out
        arr, idx, sh = self.space(addr[idx_l], sp, "ld", ins)
        self.check(arr, idx, size, sh, ins, False)
        self.count_access(idx, idx_l, size, sh, False)
        if sh:
            self.shared_access(ins, idx, idx_l // 32, size, None)
        out = np.zeros((self.n, size), np.uint8)
        out[idx_l] = arr[idx[:, None] + np.arange(size)]
        return out

    def store(self, ins: Instr, sp: str, addr: np.ndarray, data: np.ndarray, act: Mask) -> None:
        idx_l = np.arange(self.n) if act is None else np.nonzero(act)[0]
        size = data.shape[1]
        arr, idx, sh = self.space(addr[idx_l], sp, "st", ins)
        self.check(arr, idx, size, sh, ins, True)
        self.count_access(idx, idx_l, size, sh, True)
        if sh:
            self.shared_access(ins, idx, idx_l // 32, size, data[idx_l])
        else:
            arr[idx[:, None] + np.arange(size)] = data[idx_l]

    def _sp(self, o):
        for q in o:
            if q.startswith("shared"):
                return "shared"
            if q.startswith("global"):
                return "global"
            if q.startswith("param"):
                return "param"
        return "generic"

    def op_ld(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        nv = next((int(q[1:]) for q in mods if q in ("v2", "v4", "v8")), 1)
        w = WIDTH[ty]
        b = self.load(ins, self._sp(mods), self.addr(args[1]), w * nv, act)
        ds = split_args(args[0][1:-1]) if args[0][0] == "{" else [args[0]]
        for i, d in enumerate(ds):
            v = np.ascontiguousarray(b[:, i * w : (i + 1) * w]).view(NP[ty]).reshape(self.n)
            rw = self.raw(d).dtype.itemsize if d != "_" else w
            if rw > w:
                v = v.astype(NP[("s" if ty[0] == "s" else "u") + str(8 * rw)])
            self.put(d, v, act)

    op_ldu = op_ld

    def op_st(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        w = WIDTH[ty]
        vs = split_args(args[1][1:-1]) if args[1][0] == "{" else [args[1]]
        b = np.concatenate(
            [np.ascontiguousarray(self.val(v, ty)).view(np.uint8).reshape(self.n, w) for v in vs], 1
        )
        self.store(ins, self._sp(mods), self.addr(args[0]), b, act)

    def op_red(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ad, ty = (self.addr(args[0]), mods[-1])
        sp = self._sp(mods)
        self.synced |= sp != "shared"
        op = next(q for q in mods if q in ("add", "max", "min", "or", "and"))
        vs = split_args(args[1][1:-1]) if args[1][0] == "{" else [args[1]]
        for j, vn in enumerate(vs):
            v = self.val(vn, ty)
            for thread in np.nonzero(self.A(act))[0]:
                arr, idx, sh = self.space(ad[thread : thread + 1] + j * WIDTH[ty], sp, "red", ins)
                self.check(arr, idx, WIDTH[ty], sh, ins, False)
                i = int(idx[0])
                q = arr[i : i + WIDTH[ty]].view(NP[ty])
                if ty in ("bf16x2",):
                    q32 = bf16_to_f32(q.view(np.uint16)) + bf16_to_f32(
                        v[thread : thread + 1].view(np.uint16)
                    )
                    arr[i : i + 4] = f32_to_bf16(q32).view(np.uint8)
                else:
                    q[0] = {
                        "add": lambda x, y: x + y,
                        "max": max,
                        "min": min,
                        "or": lambda x, y: x | y,
                        "and": lambda x, y: x & y,
                    }[op](q[0], v[thread])
            self.m.count["atomics"] += int(self.A(act).sum())

    def op_atom(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ad, ty = (self.addr(args[1]), mods[-1])
        sp = self._sp(mods)
        self.synced |= sp != "shared"
        out = np.zeros(self.n, NP[ty])
        op = next(
            q for q in mods if q in ("add", "exch", "cas", "max", "min", "or", "and", "inc", "xor")
        )
        v = self.val(args[2], ty)
        v3 = self.val(args[3], ty) if len(args) > 3 else None
        for thread in np.nonzero(self.A(act))[0]:
            arr, idx, sh = self.space(ad[thread : thread + 1], sp, "atom", ins)
            self.check(arr, idx, WIDTH[ty], sh, ins, False)
            q = arr[int(idx[0]) : int(idx[0]) + WIDTH[ty]].view(NP[ty])
            out[thread] = q[0]
            old, new = q[0], v[thread]
            if op == "cas":
                q[0] = v3[thread] if old == new else old
            else:
                q[0] = ATOMIC[op](old, new)
        self.put(args[0], out, act)
