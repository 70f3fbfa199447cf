"""mma.sync, wgmma, ldmatrix and stmatrix by the PTX ISA fragment layouts."""

from __future__ import annotations

import re

import numpy as np

from .formats import SBASE, PtxError, bf16_to_f32
from .memory import Memory
from .parser import Instr
from .registers import Mask


class TensorCores(Memory):
    """Matrix fragments between registers and shared memory."""

    def elem(self, ty: str, u):
        """32-bit fragments [.., regs] to float32 elements [.., regs, per]"""
        if ty == "bf16":
            return bf16_to_f32(np.ascontiguousarray(u).view(np.uint16)).reshape((*u.shape, 2))
        if ty == "f16":
            return (
                np.ascontiguousarray(u).view(np.float16).astype(np.float32).reshape((*u.shape, 2))
            )
        if ty == "tf32":
            return (u & np.uint32(4294959104)).view(np.float32).reshape((*u.shape, 1))
        raise PtxError(f"mma of {ty}")

    def op_mma(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        m, n, k = map(
            int,
            re.match(
                "m(\\d+)n(\\d+)k(\\d+)", next(q for q in mods if re.match("m\\d+n\\d+k", q))
            ).groups(),
        )
        dt, at = (mods[-4], mods[-3])
        if (m, n) != (16, 8) or dt != "f32":
            raise PtxError(ins.text)
        A = self.A(act)
        W = self.n // 32
        ar = np.stack([self.val(q, "b32") for q in self.vec(args[1])], 1).reshape(W, 32, -1)
        br = np.stack([self.val(q, "b32") for q in self.vec(args[2])], 1).reshape(W, 32, -1)
        cr = np.stack([self.val(q, "f32") for q in self.vec(args[3])], 1).reshape(W, 32, 4)
        ae, be = (self.elem(at, ar), self.elem(at, br))
        per = ae.shape[-1]
        g, t = (np.arange(32) // 4, np.arange(32) % 4)
        Am, Bm, Cm = (
            np.zeros((W, 16, k), np.float32),
            np.zeros((W, k, 8), np.float32),
            np.zeros((W, 16, 8), np.float32),
        )
        for i in range(ae.shape[2]):
            for e in range(per):
                Am[:, g + 8 * (i % 2), t * per + e + 4 * per * (i // 2)] = ae[:, :, i, e]
        for i in range(be.shape[2]):
            for e in range(per):
                Bm[:, t * per + e + 4 * per * i, g] = be[:, :, i, e]
        for i in range(4):
            Cm[:, g + 8 * (i // 2), 2 * t + i % 2] = cr[:, :, i]
        D = Am @ Bm + Cm
        for i, d in enumerate(self.vec(args[0])):
            self.put(
                d, np.ascontiguousarray(D[:, g + 8 * (i // 2), 2 * t + i % 2]).reshape(-1), act
            )
        self.m.count["mma_flops"] += 2 * m * n * k * int(A.reshape(W, 32).all(1).sum())
        if not (A.reshape(W, 32).all(1) | ~A.reshape(W, 32).any(1)).all():
            raise PtxError(f"line {ins.line}: mma.sync with part of a warp")

    def op_ldmatrix(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        num = int(next(q for q in mods if re.match("x\\d", q))[1:])
        ad = self.addr(args[1])
        A = self.A(act)
        W = self.n // 32
        ad = np.where(ad >= SBASE, ad - SBASE, ad).reshape(W, 32)
        regs = self.vec(args[0])
        ws = np.nonzero(A.reshape(W, 32).all(1))[0]
        for i in range(num):
            rows = ad[ws, 8 * i : 8 * i + 8].reshape(-1)
            self.check(self.smem, rows, 16, True, ins, False)
            self.shared_access(ins, rows, np.repeat(ws, 8), 16, None)
            mats = self.smem[rows[:, None] + np.arange(16)].view(np.uint16).reshape(len(ws), 8, 8)
            if "trans" in mods:
                mats = mats.transpose(0, 2, 1)
            v = np.ascontiguousarray(mats).reshape(len(ws), 32, 2)
            v = np.ascontiguousarray(v).view(np.uint32).reshape(len(ws), 32)
            out = self.raw(regs[i]).copy().reshape(W, 32)
            out[ws] = v
            self.r[regs[i]] = out.reshape(-1)
            for w in range(len(ws)):
                words = (rows.reshape(len(ws), 8)[w][:, None] + np.arange(0, 16, 4)).reshape(
                    -1
                ) // 4
                self.m.count["smem_wavefronts"] += int(
                    np.bincount(np.unique(words) % 32, minlength=32).max()
                )
                self.m.count["smem_ideal"] += 1

    def op_stmatrix(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ad = self.addr(args[0])
        A = self.A(act)
        W = self.n // 32
        ad = np.where(ad >= SBASE, ad - SBASE, ad).reshape(W, 32)
        ws = np.nonzero(A.reshape(W, 32).all(1))[0]
        for i, rg in enumerate(self.vec(args[1])):
            v = (
                np.ascontiguousarray(self.val(rg, "b32").reshape(W, 32)[ws])
                .view(np.uint16)
                .reshape(len(ws), 8, 8)
            )
            if "trans" in mods:
                v = v.transpose(0, 2, 1)
            rows = ad[ws, 8 * i : 8 * i + 8].reshape(-1)
            self.check(self.smem, rows, 16, True, ins, True)
            data = np.ascontiguousarray(v).reshape(-1, 8).view(np.uint8)
            self.shared_access(ins, rows, np.repeat(ws, 8), 16, data)

    def smem_tile(self, ins: Instr, group: int, desc, mn, k, major_mn, es=2):
        """[mn, k] matrix a wgmma descriptor names"""
        st, lbo, sbo, sw = (
            (desc & 16383) << 4,
            (desc >> 16 & 16383) << 4,
            (desc >> 32 & 16383) << 4,
            desc >> 62,
        )
        i, j = np.meshgrid(np.arange(mn), np.arange(k), indexing="ij")
        span = {0: 16, 1: 128, 2: 64, 3: 32}[sw] // es
        if not major_mn:
            off = i // 8 * sbo + i % 8 * (span * es) + j % span * es + j // span * lbo
        else:
            off = j // 8 * sbo + j % 8 * (span * es) + i % span * es + i // span * lbo
        ad = st + off
        if sw:
            bits = {1: 3, 2: 2, 3: 1}[sw]
            ad = ad ^ (ad >> 7 & (1 << bits) - 1) << 4
        if ad.max() + es > len(self.smem):
            raise PtxError("wgmma descriptor reaches past shared memory")
        if not self.sinit[ad].all():
            raise self.fault(ins, "read of uninitialised shared memory by the tensor cores")
        for warp in range(4 * group, 4 * group + 4):
            flat = ad.reshape(-1)
            self.shared_access(ins, flat, np.full(len(flat), warp), 1, None)
        return self.smem[ad[..., None] + np.arange(es)].view(np.uint16)[..., 0]

    def op_wgmma(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if mods[0] != "mma_async":
            return self.wgmma_order(mods, args, act)
        m, n, k = map(
            int,
            re.match(
                "m(\\d+)n(\\d+)k(\\d+)", next(q for q in mods if re.match("m\\d+n\\d+k", q))
            ).groups(),
        )
        at = mods[-2]
        conv = bf16_to_f32 if at == "bf16" else lambda u: u.view(np.float16).astype(np.float32)
        if at not in ("bf16", "f16"):
            raise PtxError(ins.text)
        d = self.vec(args[0])
        A = self.A(act)
        ra = args[1][0] == "{"
        rest = args[3:]
        sc = self.pval(rest[0])
        sa, sb = (int(rest[1]), int(rest[2]))
        tr = [int(q) for q in rest[3:]]
        ta, tb = (0, tr[0]) if ra and tr else (tr[0], tr[1]) if len(tr) == 2 else (0, 0)
        g, t = (np.arange(32) // 4, np.arange(32) % 4)
        for w in range(0, self.n // 128):
            sl = slice(128 * w, 128 * w + 128)
            if not A[sl].any():
                continue
            if not A[sl].all():
                raise PtxError(f"line {ins.line}: wgmma with part of a warpgroup")
            if ra:
                fr = np.stack([self.val(q, "b32")[sl] for q in self.vec(args[1])], 1).reshape(
                    4, 32, 4
                )
                e = self.elem(at, fr)
                Am = np.zeros((64, k), np.float32)
                for wi in range(4):
                    for i in range(4):
                        for p in range(2):
                            Am[16 * wi + g + 8 * (i % 2), 2 * t + p + 8 * (i // 2)] = e[wi, :, i, p]
            else:
                Am = conv(self.smem_tile(ins, w, int(self.val(args[1], "u64")[sl][0]), 64, k, ta))
            Bm = conv(self.smem_tile(ins, w, int(self.val(args[2], "u64")[sl][0]), n, k, tb)).T
            inputs = self.vec(args[1]) if ra else []
            for q in [*d, *inputs]:
                if self.last_write.get(q, 0) > self.fenced[w]:
                    raise self.fault(ins, f"no wgmma.fence since {q} was written")
            P = sa * sb * (Am @ Bm)
            for i, q in enumerate(d):
                col, row = (8 * (i // 4) + 2 * t + i % 2, g + 8 * (i // 2 % 2))
                v = np.stack([P[16 * wi + row, col] for wi in range(4)]).reshape(-1)
                reg = self.raw(q).copy()
                old = reg[sl].view(np.float32)
                reg[sl] = np.ascontiguousarray(np.where(sc[sl], old, 0) + v, np.float32).view(
                    np.uint32
                )
                self.r[q] = reg
            self.in_flight[w].update(dict.fromkeys([*d, *inputs], self.committed[w]))
            self.m.count["mma_flops"] += 2 * m * n * k

    def wgmma_order(self, mods: list[str], args: list[str], act: Mask) -> None:
        """wgmma.fence, commit_group and wait_group of the warpgroups that execute it."""
        for w in np.unique(np.nonzero(self.A(act))[0] // 128):
            if mods[0] == "fence":
                self.fenced[w] = self.step
            elif mods[0] == "commit_group":
                self.committed[w] += 1
            elif mods[0] == "wait_group":
                done = self.committed[w] - int(args[0], 0)
                flying = self.in_flight[w].items()
                self.in_flight[w] = {q: group for q, group in flying if group >= done}

    def refuse_in_flight(self, ins: Instr, act: Mask) -> None:
        """An ordinary instruction may not touch the registers of a wgmma not yet waited for."""
        named = [q for a in ins.args for q in self.vec(a)]
        for w in np.unique(np.nonzero(self.A(act))[0] // 128):
            for q in named:
                if q in self.in_flight[w]:
                    raise self.fault(ins, f"{q} belongs to a wgmma that has not been waited for")
