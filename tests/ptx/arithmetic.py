"""Numbers: arithmetic, compare, select, move and convert instructions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .formats import (
    NP,
    PACKED,
    RAW,
    SBASE,
    WIDTH,
    bf16_to_f32,
    f32_to_bf16,
    numbers,
    packed,
)
from .parser import Instr, split_args
from .registers import Mask, Registers

Fn = Callable[..., np.ndarray]
Op = Callable[[Any, Instr, list[str], list[str], Mask], None]
COMPARE: dict[str, Fn] = {
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
    "num": lambda p, q: ~(np.isnan(p) | np.isnan(q)),
    "nan": lambda p, q: np.isnan(p) | np.isnan(q),
}
ROUND: dict[str, Fn] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


# Modifiers that change nothing here, or that the instructions below look at.
PLAIN = {
    *WIDTH, "rn", "ftz", "sat", "relu", "approx", "full", "lo", "hi", "wide", "NaN", "rz", "rm",
    "rp", "noftz",
}  # fmt: skip
DIRECTED = {"rz", "rm", "rp"}
CONVERSIONS = {*NP, *DIRECTED, "tf32", "rn", "rna", "ftz", "sat", "relu", *ROUND}


def rounded(exact: np.ndarray, mods: list[str]) -> np.ndarray:
    """float64 to float32 by the rounding mode of the instruction."""
    near = exact.astype(np.float32)
    if DIRECTED.isdisjoint(mods):
        return near
    down = np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
    up = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    if "rm" in mods:
        return down
    return up if "rp" in mods else np.where(exact > 0, down, up)


def _numeric(fn: Fn) -> Op:
    """An instruction on numbers: one destination, `fn` of all sources.

    `add.f32.bf16` and the like widen every source but the last.
    """

    def op(self: Any, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if not PLAIN.issuperset(mods):
            raise self.fault(f"opcode not known: {ins.text}")
        ty, values = mods[-1], self.sources(mods, args[1:])
        if len(mods) > 1 and mods[-2] == "f32":
            ty = "f32"
        if ty == "f32" and not DIRECTED.isdisjoint(mods):
            result = rounded(fn(*(v.astype(np.float64) for v in values)), mods)
        elif not DIRECTED.isdisjoint(mods):
            raise self.fault(f"opcode not known: {ins.text}")
        else:
            result = self.packed(fn(*values), ty)
        if "sat" in mods and ty == "f32":
            result = np.clip(np.nan_to_num(result, nan=0.0), 0, 1).astype(result.dtype)
        self.put(args[0], result, act)

    return op


def _unary(fn: Fn) -> Op:
    """A floating function of one operand."""

    def op(self: Any, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        v = self.floats(args[1], mods[-1])
        self.put(args[0], self.packed(fn(v).astype(v.dtype), mods[-1]), act)

    return op


def _extreme(ignoring: Fn, keeping: Fn) -> Op:
    """min or max of two or three operands; without `.NaN` a NaN operand loses."""

    def op(self: Any, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if not PLAIN.issuperset(mods):  # such as xorsign
            raise self.fault(f"opcode not known: {ins.text}")
        fn = keeping if "NaN" in mods else ignoring
        values = (self.floats(x, mods[-1]) for x in args[1:])
        self.put(args[0], self.packed(functools.reduce(fn, values), mods[-1]), act)

    return op


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Floats exactly rounded; integers towards zero, and zero where PTX leaves it undefined."""
    if x.dtype.kind == "f":
        return x / y
    safe = np.where(y == 0, 1, y)
    quotient = x // safe
    if x.dtype.kind == "i":
        quotient += ((quotient * safe != x) & ((x < 0) != (safe < 0))).astype(x.dtype)
    return np.where(y == 0, 0, quotient).astype(x.dtype)


class Arithmetic(Registers):
    """Numbers between registers."""

    def floats(self, operand: str, ty: str) -> np.ndarray:
        """The operand as numpy numbers: bf16 as float32, packed pairs as two elements a thread."""
        return numbers(self.val(operand, PACKED.get(ty, ty)), ty)

    def sources(self, mods: list[str], operands: list[str]) -> list[np.ndarray]:
        """Operands as numbers; with `.f32.bf16` all but the last are bf16, widened."""
        ty = mods[-1]
        if len(mods) > 1 and mods[-2] == "f32" and ty in ("f16", "bf16"):
            narrow = [self.floats(x, ty).astype(np.float32) for x in operands[:-1]]
            return [*narrow, self.floats(operands[-1], "f32")]
        return [self.floats(x, ty) for x in operands]

    def packed(self, v: np.ndarray, ty: str) -> np.ndarray:
        """The inverse of `floats`, rounding to the type."""
        return packed(v, ty)

    op_add = _numeric(lambda x, y: x + y)
    op_sub = _numeric(lambda x, y: x - y)
    op_div = _numeric(_divide)
    op_rem = _numeric(lambda x, y: np.fmod(x, np.where(y == 0, 1, y)))
    op_neg = _numeric(lambda x: -x)
    op_abs = _numeric(np.abs)
    op_min = _extreme(np.fmin, np.minimum)
    op_max = _extreme(np.fmax, np.maximum)
    op_copysign = _numeric(lambda x, y: np.copysign(y, x))
    op_ex2 = _unary(np.exp2)
    op_lg2 = _unary(np.log2)
    op_rcp = _unary(lambda v: 1 / v)
    op_sqrt = _unary(np.sqrt)
    op_rsqrt = _unary(lambda v: 1 / np.sqrt(v))
    op_tanh = _unary(np.tanh)
    op_sin = _unary(np.sin)
    op_cos = _unary(np.cos)

    def op_mov(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        d, v = args
        if d[0] == "{":
            parts = split_args(d[1:-1])
            x = self.val(v, ty)
            w = WIDTH[ty] // len(parts)
            columns: np.ndarray = np.ascontiguousarray(x).view(RAW[w]).reshape(self.n, len(parts))
            for i, p in enumerate(parts):
                self.put(p, columns[:, i], act)
        elif v[0] == "{":
            parts = split_args(v[1:-1])
            w = WIDTH[ty] // len(parts)
            columns = np.stack([self._part(p, f"b{8 * w}") for p in parts], 1)
            self.put(d, columns.view(RAW[WIDTH[ty]]).reshape(self.n), act)
        else:
            self.put(d, self.pval(v) if ty == "pred" else self.val(v, ty), act)

    def _part(self, name: str, ty: str) -> np.ndarray:
        """A part of a packed register; compilers leave halves undefined that nothing uses."""
        if name in self.k.regs and (name not in self.r or name in self.undefined):
            poison = np.full(self.n, 0xFFFF_FFFF, np.uint32).astype(RAW[WIDTH[ty]])
            if name not in self.r:
                return poison
            return np.where(self.undefined[name], poison, self.r[name]).astype(RAW[WIDTH[ty]])
        return self.val(name, ty)

    def op_mul(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        if not PLAIN.issuperset(mods) or (len(mods) > 1 and mods[-2] == "f32"):
            raise self.fault(f"opcode not known: {ins.text}")
        if "wide" in mods:
            w = NP[ty[0] + str(2 * int(ty[1:]))]
            result = self.val(args[1], ty).astype(w) * self.val(args[2], ty).astype(w)
        elif "hi" in mods:
            result = self._high(self.val(args[1], ty), self.val(args[2], ty), ty)
        elif not DIRECTED.isdisjoint(mods) and ty == "f32":
            wide = self.val(args[1], ty).astype(np.float64) * self.val(args[2], ty)
            result = rounded(wide, mods)
        else:
            result = self.packed(self.floats(args[1], ty) * self.floats(args[2], ty), ty)
        if "sat" in mods and ty == "f32":
            result = np.clip(np.nan_to_num(result, nan=0.0), 0, 1).astype(result.dtype)
        self.put(args[0], result, act)

    @staticmethod
    def _high(x: np.ndarray, y: np.ndarray, ty: str) -> np.ndarray:
        """The upper half of a product."""
        if WIDTH[ty] == 8:
            big = [int(p) * int(q) >> 64 for p, q in zip(x, y)]
            return np.array([v & 2**64 - 1 for v in big], np.uint64)
        w = NP[ty[0] + str(2 * int(ty[1:]))]
        return (x.astype(w) * y.astype(w) >> 8 * WIDTH[ty]).astype(NP[ty])

    def op_mad(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        x, y = self.val(args[1], ty), self.val(args[2], ty)
        if "wide" in mods:
            wide = ty[0] + str(2 * int(ty[1:]))
            result = x.astype(NP[wide]) * y.astype(NP[wide]) + self.val(args[3], wide)
        elif "hi" in mods:
            result = self._high(x, y, ty).view(NP[ty]) + self.val(args[3], ty)
        else:
            result = x * y + self.val(args[3], ty)
        self.put(args[0], result, act)

    def op_fma(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if not PLAIN.issuperset(mods):
            raise self.fault(f"opcode not known: {ins.text}")
        x, y, z = self.sources(mods, args[1:])
        ty = "f32" if len(mods) > 1 and mods[-2] == "f32" else mods[-1]
        if x.dtype == np.float64:
            result = x * y + z
        else:
            # The product of two floats is exact in float64, so only the sum rounds twice.
            exact = x.astype(np.float64) * y + z
            if not DIRECTED.isdisjoint(mods) and ty != "f32":
                raise self.fault(f"opcode not known: {ins.text}")
            result = rounded(exact, mods) if ty == "f32" else exact.astype(x.dtype)
        if "relu" in mods:
            result = np.maximum(result, 0)
        self.put(args[0], self.packed(result, ty), act)

    def op_selp(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        x, y = (self.val(q, mods[-1]) for q in args[1:3])
        self.put(args[0], np.where(self.pval(args[3]), x, y), act)

    def op_setp(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        result = COMPARE[mods[0]](self.floats(args[1], ty), self.floats(args[2], ty))
        other = ~result
        if len(mods) > 2 and mods[1] in ("and", "or", "xor"):
            q = self.pval(args[3])
            mix = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[mods[1]]
            result, other = mix(result, q), mix(other, q)
        names = args[0].split("|")
        self.put(names[0], result, act)
        if len(names) > 1:
            self.put(names[1], other, act)

    def op_cvt(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        d, source = mods[-2], mods[-1]
        known = CONVERSIONS.issuperset(mods) and ("rna" in mods) == (d == "tf32")
        if not known or (DIRECTED & set(mods) and source in ("f32", "f64")):
            raise self.fault(f"opcode not known: {ins.text}")
        if source == "f32" and d in ("bf16x2", "f16x2"):
            pair = np.stack([self.val(args[2], "f32"), self.val(args[1], "f32")], 1)
            if "relu" in mods:
                pair = np.maximum(pair, 0)
            halves = f32_to_bf16(pair) if d == "bf16x2" else pair.astype(np.float16).view(np.uint16)
            self.put(args[0], np.ascontiguousarray(halves).view(np.uint32)[:, 0], act)
            return
        v = bf16_to_f32(self.val(args[1], "u16")) if source == "bf16" else self.val(args[1], source)
        if "relu" in mods:
            v = np.maximum(v, 0)
        if "sat" in mods and d[0] == "f":
            v = np.clip(np.nan_to_num(v, nan=0.0), 0, 1)
        if d == "bf16":
            self.put(args[0], f32_to_bf16(v.astype(np.float32)), act)
        elif d == "tf32":
            bits = np.ascontiguousarray(v).view(np.uint32)
            self.put(args[0], bits + 0x1000 & np.uint32(0xFFFFE000), act)
        elif d in ("f32", "f64", "f16"):
            way = next((q for q in mods if q in ROUND), None)
            self.put(args[0], (ROUND[way](v) if way else v).astype(NP[d]), act)
        else:
            self.put(args[0], self._to_integer(v, d, mods, args[0]), act)

    def _to_integer(self, v: np.ndarray, d: str, mods: list[str], name: str) -> np.ndarray:
        """Round, saturate (always, from floats), and extend to the register's width."""
        info: Any = np.iinfo(NP[d])  # type: ignore[type-var]
        if v.dtype.kind == "f":
            v = np.nan_to_num(ROUND[next(q for q in mods if q in ROUND)](v.astype(np.float64)))
            whole = np.clip(v, float(info.min), float(info.max))
            # The largest 64-bit numbers are no doubles.
            over = v >= float(info.max)
            v = np.where(over, info.max, np.where(over, 0, whole).astype(NP[d]))
        elif "sat" in mods:
            v = np.clip(v, info.min, info.max)
        v = v.astype(NP[d])
        w = WIDTH[self.k.regs[name]]
        if WIDTH[d] < w:
            v = v.astype(NP[d[0] + str(8 * w)] if d[0] in "us" else RAW[w])
        return v

    def op_cvta(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        v = self.val(args[1], mods[-1]).astype(np.int64)
        if any(q.startswith("shared") for q in mods):
            v = np.where(v >= SBASE, v - SBASE, v) if "to" in mods else v + SBASE
        self.put(args[0], v.astype(np.uint64), act)
