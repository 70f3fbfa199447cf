"""mma.sync, ldmatrix and stmatrix by the fragment layouts of the PTX ISA."""

from __future__ import annotations

import re

import numpy as np

from .formats import bf16_to_f32
from .parser import Instr
from .registers import Mask
from .warp import WarpWide

LANE = np.arange(32)
GROUP, PLACE = LANE // 4, LANE % 4  # group id and thread in group of the ISA's figures


def shape_of(mods: list[str]) -> tuple[int, int, int]:
    """(m, n, k) from the mNnNkN modifier."""
    for q in mods:
        m = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", q)
        if m:
            return int(m[1]), int(m[2]), int(m[3])
    raise ValueError(f"no shape in {mods}")


def elements(ty: str, regs: np.ndarray) -> np.ndarray | None:
    """32-bit fragments `[..., regs]` as float32 `[..., regs, elements of a register]`."""
    u = np.ascontiguousarray(regs)
    if ty == "bf16":
        return bf16_to_f32(u.view(np.uint16)).reshape((*u.shape, 2))
    if ty == "f16":
        return u.view(np.float16).astype(np.float32).reshape((*u.shape, 2))
    if ty == "tf32":
        return (u & np.uint32(0xFFFFE000)).view(np.float32).reshape((*u.shape, 1))
    if ty in ("s8", "u8"):
        return u.view(np.int8 if ty == "s8" else np.uint8).astype(np.float64).reshape((*u.shape, 4))
    return None


class TensorCores(WarpWide):
    """Matrix fragments between registers and shared memory."""

    def fragments(self, operand: str) -> np.ndarray:
        """Registers of a vector operand as uint32 `[warps, 32, registers]`."""
        return np.stack([self.val(q, "b32") for q in self.vec(operand)], 1).reshape(
            self.n // 32, 32, -1
        )

    def op_mma(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        m, n, k = shape_of(mods)
        out, left, right = mods[-4], mods[-3], mods[-2]
        a, b = elements(left, self.fragments(args[1])), elements(right, self.fragments(args[2]))
        if (m, n) != (16, 8) or out not in ("f32", "s32", "f16") or a is None or b is None:
            raise self.fault(f"opcode not known: {ins.text}")
        warps, per = self.n // 32, a.shape[-1]
        ma, mb = np.zeros((warps, 16, k), a.dtype), np.zeros((warps, k, 8), a.dtype)
        for i in range(a.shape[2]):
            for e in range(per):
                ma[:, GROUP + 8 * (i % 2), PLACE * per + e + 4 * per * (i // 2)] = a[:, :, i, e]
        for i in range(b.shape[2]):
            for e in range(per):
                mb[:, PLACE * per + e + 4 * per * i, GROUP] = b[:, :, i, e]
        product = ma @ mb
        old = self.vec(args[3])
        halves = out == "f16"
        for i, d in enumerate(self.vec(args[0])):
            row = GROUP + 8 * (i if halves else i // 2)
            if halves:
                pair = np.stack([product[:, row, 2 * PLACE + e] for e in range(2)], -1)
                c = self.val(old[i], "b32").view(np.float16).astype(np.float32)
                v = (pair.reshape(-1) + c).astype(np.float16).view(np.uint32)
            else:
                v = product[:, row, 2 * PLACE + i % 2].reshape(-1)
                v = (v + self.val(old[i], out)).astype(np.float32 if out == "f32" else np.int32)
            self.put(d, v, act)
        count = warps if act is None else int(act.reshape(-1, 32)[:, 0].sum())
        self.m.count["mma_flops"] += 2 * m * n * k * count

    def _rows(self, where: str, matrix: int, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index into smem, lane) of the eight row addresses of one 8x8 matrix of each warp."""
        lanes = (warps[:, None] * 32 + 8 * matrix + np.arange(8)).reshape(-1)
        return self.shared_index(self.addr(where)[lanes], lanes, 16), lanes

    def op_ldmatrix(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if "m8n8" not in mods or mods[-1] != "b16":
            raise self.fault(f"opcode not known: {ins.text}")
        warps = np.nonzero(self.active(act).reshape(-1, 32)[:, 0])[0]
        for i, reg in enumerate(self.vec(args[0])):
            at, lanes = self._rows(args[1], i, warps)
            data = self.shared_read(at, lanes, 16)
            self.m.counters.matrix(ins, at, np.repeat(warps, 8))
            tiles = data.view(np.uint16).reshape(-1, 8, 8)
            if "trans" in mods:
                tiles = tiles.transpose(0, 2, 1)
            v = np.zeros((self.n // 32, 32), np.uint32)
            v[warps] = np.ascontiguousarray(tiles).reshape(-1, 64).view(np.uint32)
            self.put(reg, v.reshape(-1), act)

    def op_stmatrix(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if "m8n8" not in mods or mods[-1] != "b16":
            raise self.fault(f"opcode not known: {ins.text}")
        warps = np.nonzero(self.active(act).reshape(-1, 32)[:, 0])[0]
        for i, reg in enumerate(self.vec(args[1])):
            v = np.ascontiguousarray(self.val(reg, "b32").reshape(-1, 32)[warps])
            tiles = v.view(np.uint16).reshape(-1, 8, 8)
            if "trans" in mods:
                tiles = tiles.transpose(0, 2, 1)
            at, lanes = self._rows(args[0], i, warps)
            self.shared_write(at, lanes, np.ascontiguousarray(tiles).reshape(-1, 8).view(np.uint8))
            self.m.counters.matrix(ins, at, np.repeat(warps, 8))
