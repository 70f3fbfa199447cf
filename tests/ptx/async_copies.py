"""cp.async and the tensor-map copies (TMA)."""

from __future__ import annotations

import re

import numpy as np

from .barriers import Barriers
from .formats import GBASE, SBASE, PtxError
from .parser import Instr
from .registers import POISON, Mask


class AsyncCopies(Barriers):
    """Copies whose result a thread sees only after it has waited for them."""

    def op_cp(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if mods[0] != "async":
            raise PtxError(ins.text)
        if mods[1] == "commit_group" or mods[1] == "wait_group" or mods[1] == "wait_all":
            ls = np.nonzero(self.A(act))[0]
            for w in np.unique(ls // 32):
                q = self.async_groups[w]
                if mods[1] == "commit_group":
                    q.append(self.pending.pop(w, []))
                else:
                    keep = int(args[0], 0) if mods[1] == "wait_group" else 0
                    if mods[1] == "wait_all":
                        q.append(self.pending.pop(w, []))
                    while len(q) > keep:
                        for dst, data in q.popleft():
                            self.shared_access(ins, dst, np.full(len(dst), w), data.shape[1], data)
                            self.sinit[dst[:, None] + np.arange(data.shape[1])] = True
            return
        if "bulk" in mods:
            return self.bulk(ins, mods, args, act)
        if "mbarrier" in mods:
            raise PtxError(ins.text)
        dst, src, n = (self.addr(args[0]), self.addr(args[1]), int(args[2], 0))
        nb = self.val(args[3], "u32").astype(np.int64) if len(args) > 3 else np.full(self.n, n)
        A = self.A(act)
        for w in np.unique(np.nonzero(A)[0] // 32):
            L = np.nonzero(A)[0]
            L = L[w == L // 32]
            d = np.where(dst[L] >= SBASE, dst[L] - SBASE, dst[L])
            data = np.zeros((len(L), n), np.uint8)
            if (d % n).any() or d.max() + n > len(self.smem):
                raise self.fault(ins, "cp.async shared destination out of bounds or misaligned")
            for size in np.unique(nb[L]):
                if size == 0:
                    continue
                sel = nb[L] == size
                idx = src[L][sel] - GBASE
                if size in (4, 8, 16):
                    self.check(self.m.mem, idx, int(size), False, ins, False)
                data[sel, :size] = self.m.mem[idx[:, None] + np.arange(size)]
                self.count_access(idx, L[sel], int(size), False, False)
            # Poison until the wait: the issue already must not race with earlier readers.
            poison = np.full((len(d), n), POISON, np.uint8)
            self.shared_access(ins, d, np.full(len(d), w), n, poison)
            self.sinit[d[:, None] + np.arange(n)] = False
            self.pending.setdefault(w, []).append((d, data))

    def bulk(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if "commit_group" in mods or "wait_group" in mods:
            return
        if "tensor" not in mods:
            raise PtxError(ins.text)
        L = np.nonzero(self.A(act))[0]
        for thread in L:
            if mods[3 if mods[2] != "prefetch" else 4].endswith("d") is False:
                raise PtxError(ins.text)
            store = ins.text.find("global.shared::cta") >= 0 or "reduce" in mods
            tm, sm = (args[0], args[1]) if store else (args[1], args[0])
            m = re.match("\\[\\s*(\\S+?)\\s*,\\s*\\{(.*)\\}\\s*\\]", tm)
            h_addr = int(self.val(m.group(1), "u64")[thread])
            coord = [int(self.val(q.strip(), "s32")[thread]) for q in m.group(2).split(",")]
            blob = (
                self.params[h_addr : h_addr + 8]
                if h_addr < 1 << 20
                else self.m.mem[h_addr - GBASE : h_addr - GBASE + 8]
            )
            base, dims, strides, box, es, sw = self.m.tmaps[
                int(np.ascontiguousarray(blob).view(np.uint64)[0])
            ]
            sa = int(self.addr(sm)[thread])
            sa = sa - SBASE if sa >= SBASE else sa
            grids = np.meshgrid(*[np.arange(b) for b in box[::-1]], indexing="ij")[::-1]
            lin = np.zeros(grids[0].shape, np.int64)
            mul = 1
            goff = np.zeros(grids[0].shape, np.int64)
            ok = np.ones(grids[0].shape, bool)
            for d in range(len(box)):
                lin += grids[d] * mul
                mul *= box[d]
                g = grids[d] + coord[d]
                ok &= (g >= 0) & (g < dims[d])
                goff += g * (es if d == 0 else strides[d - 1])
            so = sa + lin.reshape(-1) * es
            ok = ok.reshape(-1)
            goff = base + goff.reshape(-1)
            if sw:
                bits = {1: 1, 2: 2, 3: 3}[sw]
                so = so ^ (so >> 7 & (1 << bits) - 1) << 4
            B = np.arange(es)
            if store:
                idx = goff[ok]
                self.check(self.m.mem, idx, es, False, ins, True)
                self.check(self.smem, so[ok], es, True, ins, False)
                self.shared_access(ins, so[ok], np.full(len(idx), thread // 32), es, None)
                self.m.mem[idx[:, None] + B] = self.smem[so[ok][:, None] + B]
                self.m.count["gl_st_bytes"] += int(ok.sum()) * es
            else:
                warp = np.full(len(so), thread // 32)
                self.shared_access(ins, so, warp, es, np.zeros((len(so), es), np.uint8))
                idx = goff[ok]
                self.check(self.m.mem, idx, es, False, ins, False)
                self.smem[so[ok][:, None] + B] = self.m.mem[idx[:, None] + B]
                self.sinit[so[:, None] + B] = True
                self.m.count["gl_ld_bytes"] += int(ok.sum()) * es
                bar = self.mb(self.addr(args[2])[thread])
                self.races.release(thread // 32, bar["clock"])
                bar["tx"] -= len(so) * es
                self.mb_try(bar)
