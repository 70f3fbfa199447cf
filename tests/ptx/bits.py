"""Bits: logic, shifts, fields, permutes and counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .formats import NP, RAW, WIDTH
from .parser import Instr
from .registers import Mask, Registers

Op = Callable[[Any, Instr, list[str], list[str], Mask], None]


def _logic(fn: Callable[..., np.ndarray]) -> Op:
    """An instruction on bits or predicates."""

    def op(self: Any, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        read = self.pval if mods[-1] == "pred" else lambda x: self.val(x, mods[-1])
        self.put(args[0], fn(*(read(x) for x in args[1:])), act)

    return op


def _bit_length(v: np.ndarray) -> np.ndarray:
    """Bits up to the highest one."""
    out = np.zeros(v.shape, np.uint32)
    left = v.astype(np.uint64)
    for shift in (32, 16, 8, 4, 2, 1):
        high = left >= np.uint64(1) << np.uint64(shift)
        out += np.where(high, shift, 0).astype(np.uint32)
        left = np.where(high, left >> np.uint64(shift), left)
    return out + (left > 0).astype(np.uint32)


class Bits(Registers):
    """Registers as rows of bits."""

    op_and = _logic(lambda x, y: x & y)
    op_or = _logic(lambda x, y: x | y)
    op_xor = _logic(lambda x, y: x ^ y)
    op_not = _logic(lambda x: ~x)
    op_cnot = _logic(lambda x: (x == 0).astype(x.dtype))

    def op_lop3(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        x, y, z = (self.val(q, "b32") for q in args[1:4])
        table = int(args[4], 0)
        result = np.zeros(self.n, np.uint32)
        for i in range(8):
            if table >> i & 1:
                result |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        self.put(args[0], result, act)

    def op_shl(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        x, n = self.val(args[1], mods[-1]), self.val(args[2], "u32").astype(np.uint64)
        w = 8 * WIDTH[mods[-1]]
        moved = x << np.minimum(n, w - 1).astype(x.dtype)
        self.put(args[0], np.where(n >= w, 0, moved).astype(x.dtype), act)

    def op_shr(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        x, n = self.val(args[1], mods[-1]), self.val(args[2], "u32").astype(np.uint64)
        w = 8 * WIDTH[mods[-1]]
        result = x >> np.minimum(n, w - 1).astype(x.dtype)
        if x.dtype.kind == "u":
            result = np.where(n >= w, 0, result).astype(x.dtype)
        self.put(args[0], result, act)

    def op_shf(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        low, high, n = (self.val(q, "u32").astype(np.uint64) for q in args[1:])
        n = n & 31 if "wrap" in mods else np.minimum(n, 32)
        both = high << 32 | low
        result = both >> n & 0xFFFFFFFF if "r" in mods else both << n >> 32
        self.put(args[0], result.astype(np.uint32), act)

    def op_bfe(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        first, length = int(args[2], 0), int(args[3], 0)
        w = 8 * WIDTH[ty]
        bits: np.ndarray = self.val(args[1], ty).view(RAW[WIDTH[ty]])
        kind = bits.dtype.type
        result: np.ndarray = bits >> kind(first) & kind((1 << length) - 1)
        if ty[0] == "s":
            result = (result << kind(w - length)).view(NP[ty]) >> NP[ty](w - length)
        self.put(args[0], result, act)

    def op_bfi(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        x, y = (self.val(q, ty).astype(np.uint64) for q in args[1:3])
        first, length = int(args[3], 0), int(args[4], 0)
        m = np.uint64((1 << length) - 1 << first)
        self.put(args[0], (y & ~m | x << np.uint64(first) & m).astype(NP[ty]), act)

    def op_prmt(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if mods[-1] != "b32":
            raise self.fault(f"opcode not known: {ins.text}")
        x, y, c = (self.val(q, "b32") for q in args[1:4])
        pool = np.stack([x, y], 1).view(np.uint8)
        out = np.zeros((self.n, 4), np.uint8)
        for i in range(4):
            pick = c >> 4 * i & 15
            v = pool[self.all_lanes, pick & 7]
            out[:, i] = np.where(pick & 8, np.where(v & 128, 255, 0), v)
        self.put(args[0], out.view(np.uint32).reshape(self.n), act)

    def op_popc(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        self.put(args[0], np.bitwise_count(self.val(args[1], mods[-1])).astype(np.uint32), act)

    def op_clz(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        length = _bit_length(self.val(args[1], mods[-1]))
        self.put(args[0], (8 * WIDTH[mods[-1]] - length).astype(np.uint32), act)

    def op_bfind(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        ty = mods[-1]
        v = self.val(args[1], ty)
        if ty[0] == "s":
            v = np.where(v < 0, ~v, v).astype(RAW[WIDTH[ty]])
        length = _bit_length(v)
        found = 8 * WIDTH[ty] - length if "shiftamt" in mods else length - 1
        self.put(args[0], np.where(length == 0, 0xFFFFFFFF, found).astype(np.uint32), act)

    def op_brev(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        w = WIDTH[mods[-1]]
        octets = np.ascontiguousarray(self.val(args[1], mods[-1])).view(np.uint8).reshape(-1, w)
        turned = np.packbits(np.unpackbits(octets[:, ::-1], 1, bitorder="big")[:, ::-1], 1)
        self.put(args[0], np.ascontiguousarray(turned[:, ::-1]).view(RAW[w])[:, 0], act)
