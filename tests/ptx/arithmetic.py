"""Integer, floating, logic, compare and convert instructions."""

from __future__ import annotations

import functools

import numpy as np

from .formats import (
    NP,
    PACKED,
    RAW,
    SBASE,
    WIDTH,
    PtxError,
    bf16_to_f32,
    f32_to_bf16,
    numbers,
    packed,
)
from .parser import Instr, split_args
from .registers import Mask, Registers


class Arithmetic(Registers):
    """Everything between registers."""

    def op_mov(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        d, v = args
        if d[0] == "{":
            parts = split_args(d[1:-1])
            x = self.val(v, ty)
            w = WIDTH[ty] // len(parts)
            b = np.ascontiguousarray(x).view(RAW[w]).reshape(self.n, len(parts))
            for i, p in enumerate(parts):
                self.put(p, b[:, i].copy(), act)
        elif v[0] == "{":
            parts = split_args(v[1:-1])
            w = WIDTH[ty] // len(parts)
            b = np.stack([self.val(p, f"b{8 * w}") for p in parts], 1)
            self.put(d, np.ascontiguousarray(b).view(RAW[WIDTH[ty]]).reshape(self.n), act)
        elif ty == "pred":
            self.put(d, self.pval(v), act)
        else:
            self.put(d, self.val(v, ty), act)

    def arith(fn):
        def f(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
            values = [self.floats(x, mods[-1]) for x in args[1:]]
            self.put(args[0], self.packed(fn(*values), mods[-1]), act)

        return f

    def floats(self, operand: str, ty: str) -> np.ndarray:
        """The operand as numpy numbers: bf16 as float32, packed pairs as two elements a thread."""
        return numbers(self.val(operand, PACKED.get(ty, ty)), ty)

    def packed(self, v: np.ndarray, ty: str) -> np.ndarray:
        """The inverse of `floats`, rounding to the type."""
        return packed(v, ty)

    op_add = arith(lambda x, y: x + y)

    op_sub = arith(lambda x, y: x - y)

    def op_mul(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        x, y = (self.val(q, PACKED.get(ty, ty)) for q in args[1:3])
        if "wide" in mods:
            w = NP[ty[0] + str(2 * int(ty[1:]))]
            r = x.astype(w) * y.astype(w)
        elif "hi" in mods:
            if WIDTH[ty] == 8:
                big = [int(p) * int(q) >> 64 for p, q in zip(x, y)]
                r = np.array([v & 2**64 - 1 for v in big], np.uint64)
            else:
                w = NP[ty[0] + str(2 * int(ty[1:]))]
                r = (x.astype(w) * y.astype(w) >> 8 * WIDTH[ty]).astype(NP[ty])
        else:
            r = self.packed(self.floats(args[1], ty) * self.floats(args[2], ty), ty)
        self.put(args[0], r, act)

    def op_mad(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        x, y = (self.val(args[1], ty), self.val(args[2], ty))
        if "wide" in mods:
            wt = ty[0] + str(2 * int(ty[1:]))
            w = NP[wt]
            r = x.astype(w) * y.astype(w) + self.val(args[3], wt)
        else:
            r = x * y + self.val(args[3], ty)
        self.put(args[0], r, act)

    def op_fma(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        x, y, z = (self.floats(q, ty) for q in args[1:])
        if x.dtype == np.float32:
            # The product of two floats is exact in float64, so only the sum rounds twice.
            r = (x.astype(np.float64) * y + z).astype(np.float32)
        else:
            r = x * y + z
        self.put(args[0], self.packed(r, ty), act)

    op_div = arith(
        lambda x, y: (
            x / y
            if x.dtype.kind == "f"
            else np.where(
                y != 0,
                np.trunc(x.astype(np.float64) / np.where(y == 0, 1, y)).astype(x.dtype)
                if x.dtype.kind == "i"
                else x // np.where(y == 0, 1, y),
                0,
            )
        )
    )

    op_rem = arith(lambda x, y: np.fmod(x, np.where(y == 0, 1, y)))

    def _extreme(ignoring, keeping):
        """min or max of two or three operands; without `.NaN` a NaN operand loses."""

        def f(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
            fn = keeping if "NaN" in mods else ignoring
            r = functools.reduce(fn, [self.floats(x, mods[-1]) for x in args[1:]])
            self.put(args[0], self.packed(r, mods[-1]), act)

        return f

    op_min = _extreme(np.fmin, np.minimum)
    op_max = _extreme(np.fmax, np.maximum)

    def op_neg(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        self.put(args[0], -self.val(args[1], mods[-1]), act)

    def op_abs(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        self.put(args[0], np.abs(self.val(args[1], mods[-1])), act)

    def logic(fn):

        def f(self, ins: Instr, o, a, act: Mask):
            self.put(
                a[0],
                fn(*[self.pval(x) if o[-1] == "pred" else self.val(x, o[-1]) for x in a[1:]]),
                act,
            )

        return f

    op_and = logic(lambda x, y: x & y)

    op_or = logic(lambda x, y: x | y)

    op_xor = logic(lambda x, y: x ^ y)

    op_not = logic(lambda x: ~x)

    def op_lop3(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        x, y, z = (self.val(q, "b32") for q in args[1:4])
        t = int(args[4], 0)
        r = np.zeros(self.n, np.uint32)
        for i in range(8):
            if t >> i & 1:
                r |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        self.put(args[0], r, act)

    def op_shl(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        x = self.val(args[1], mods[-1])
        n = self.val(args[2], "u32").astype(np.uint64)
        w = 8 * WIDTH[mods[-1]]
        self.put(
            args[0],
            np.where(n >= w, 0, x << np.minimum(n, w - 1).astype(x.dtype)).astype(x.dtype),
            act,
        )

    def op_shr(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        x = self.val(args[1], mods[-1])
        n = self.val(args[2], "u32").astype(np.uint64)
        w = 8 * WIDTH[mods[-1]]
        r = x >> np.minimum(n, w - 1).astype(x.dtype)
        if x.dtype.kind == "u":
            r = np.where(n >= w, 0, r).astype(x.dtype)
        self.put(args[0], r, act)

    def op_shf(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        lo, hi, n = (self.val(q, "u32").astype(np.uint64) for q in args[1:])
        n = n & 31 if "wrap" in mods else np.minimum(n, 32)
        v = hi << 32 | lo
        self.put(
            args[0], (v >> n & 4294967295 if "r" in mods else v << n >> 32).astype(np.uint32), act
        )

    def op_bfe(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        x = self.val(args[1], ty)
        p, length = (int(args[2], 0), int(args[3], 0))
        w = 8 * WIDTH[ty]
        u = x.view(RAW[WIDTH[ty]])
        r = u >> np.uint64(p).astype(u.dtype) & u.dtype.type((1 << length) - 1)
        if ty[0] == "s":
            sg = w - length
            r = (r << u.dtype.type(sg)).view(NP[ty]) >> NP[ty](sg)
        self.put(args[0], r, act)

    def op_bfi(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        x, y = (
            self.val(args[1], "b32").astype(np.uint64),
            self.val(args[2], "b32").astype(np.uint64),
        )
        p, length = (int(args[3], 0), int(args[4], 0))
        m = (1 << length) - 1 << p
        self.put(
            args[0], (y & ~np.uint64(m) | x << np.uint64(p) & np.uint64(m)).astype(np.uint32), act
        )

    def op_prmt(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        x, y, c = (self.val(q, "b32") for q in args[1:4])
        b = np.concatenate(
            [
                np.ascontiguousarray(x).view(np.uint8).reshape(self.n, 4),
                np.ascontiguousarray(y).view(np.uint8).reshape(self.n, 4),
            ],
            1,
        )
        out = np.zeros((self.n, 4), np.uint8)
        for i in range(4):
            sel = c >> 4 * i & 15
            v = b[np.arange(self.n), sel & 7]
            out[:, i] = np.where(sel & 8, np.where(v & 128, 255, 0), v)
        self.put(args[0], out.view(np.uint32).reshape(self.n), act)

    def op_popc(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        self.put(args[0], np.bitwise_count(self.val(args[1], mods[-1])).astype(np.uint32), act)

    def op_selp(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        self.put(
            args[0],
            np.where(self.pval(args[3]), self.val(args[1], mods[-1]), self.val(args[2], mods[-1])),
            act,
        )

    def op_setp(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        x, y = (self.val(args[1], ty), self.val(args[2], ty))
        c = mods[0]
        fn = {
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
            "eq": np.equal,
            "ne": np.not_equal,
            "lo": np.less,
            "ls": np.less_equal,
            "hi": np.greater,
            "hs": np.greater_equal,
            "neu": np.not_equal,
            "leu": lambda p, q: ~(p > q),
            "ltu": lambda p, q: ~(p >= q),
            "geu": lambda p, q: ~(p < q),
            "gtu": lambda p, q: ~(p <= q),
            "equ": lambda p, q: ~(p < q) & ~(p > q),
        }[c]
        r = fn(x, y)
        if len(mods) > 2 and mods[1] in ("and", "or", "xor"):
            q = self.pval(args[3])
            r = {"and": r & q, "or": r | q, "xor": r ^ q}[mods[1]]
        ds = args[0].split("|")
        self.put(ds[0], r, act)
        if len(ds) > 1:
            self.put(ds[1], ~r, act)

    def op_cvt(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if mods[-1] == "f32" and mods[-2] in ("bf16x2", "f16x2"):
            hi, lo = (self.val(args[1], "f32"), self.val(args[2], "f32"))
            if "relu" in mods:
                hi, lo = (np.maximum(hi, 0), np.maximum(lo, 0))
            c = (
                f32_to_bf16
                if mods[-2] == "bf16x2"
                else lambda v: v.astype(np.float16).view(np.uint16)
            )
            self.put(args[0], c(lo).astype(np.uint32) | c(hi).astype(np.uint32) << 16, act)
            return
        d, src = (mods[-2], mods[-1])
        if src == "bf16":
            v = bf16_to_f32(self.val(args[1], "u16"))
        elif src == "tf32":
            raise PtxError("cvt from tf32")
        else:
            v = self.val(args[1], src)
        if d == "bf16":
            self.put(args[0], f32_to_bf16(v.astype(np.float32)), act)
        elif d == "tf32":
            u = np.ascontiguousarray(v).view(np.uint32)
            self.put(args[0], u + 4096 & np.uint32(4294959104), act)
        elif NP[d] in (np.float32, np.float64, np.float16):
            self.put(args[0], v.astype(NP[d]), act)
        else:
            if v.dtype.kind == "f":
                v = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[
                    next(q for q in mods if q in ("rni", "rzi", "rmi", "rpi"))
                ](v)
                v = np.clip(v, np.iinfo(NP[d]).min, np.iinfo(NP[d]).max).astype(NP[d])
            w = WIDTH[self.k.regs[args[0]]]
            v = v.astype(NP[d])
            if WIDTH[d] < w:
                v = v.astype(NP[d[0] + str(8 * w)] if d[0] in "us" else RAW[w])
            self.put(args[0], v, act)

    def op_cvta(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        v = self.val(args[1], mods[-1]).astype(np.int64)
        if "shared" in mods:
            v = np.where(v >= SBASE, v - SBASE, v) if "to" in mods else v + SBASE
        self.put(args[0], v.astype(np.uint64), act)

    def unary(fn):

        def f(self, ins: Instr, o, a, act: Mask):
            self.put(a[0], fn(self.val(a[1], o[-1])).astype(NP[o[-1]]), act)

        return f

    op_ex2 = unary(np.exp2)

    op_lg2 = unary(np.log2)

    op_rcp = unary(lambda v: 1 / v)

    op_sqrt = unary(np.sqrt)

    op_rsqrt = unary(lambda v: 1 / np.sqrt(v))
