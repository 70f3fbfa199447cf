"""PTX types as numpy types, the address windows, bf16 rounding, and the one error type."""

from __future__ import annotations

import numpy as np

WIDTH = {
    "pred": 0,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "f16x2": 4,
    "bf16x2": 4,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
    "f32x2": 8,
    "e4m3": 1,
    "e5m2": 1,
}
NP = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "bf16x2": np.uint32,
    "f16x2": np.uint32,
    "bf16": np.uint16,
}
RAW = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
GBASE, SBASE = 0x10_0000_0000, 0x1_0000_0000  # generic windows: global arena, shared memory


class PtxError(RuntimeError):
    """A fault of the executed program (or PTX that this interpreter does not know).

    `kernel`, `block`, `thread`, `line` (of the PTX), `source` (file:line where `.loc` says),
    `address` and `what` are attributes; the message holds them all.
    """

    def __init__(
        self,
        what: str,
        *,
        kernel: str = "",
        block: tuple[int, ...] | None = None,
        thread: int | None = None,
        line: int | None = None,
        source: str = "",
        address: int | None = None,
        text: str = "",
    ) -> None:
        self.what, self.kernel, self.block, self.thread = what, kernel, block, thread
        self.line, self.source, self.address, self.text = line, source, address, text
        short = kernel if len(kernel) <= 80 else f"{kernel[:77]}..."
        where = [short] if kernel else []
        where += [f"block {block}"] if block is not None else []
        where += [f"thread {thread}"] if thread is not None else []
        where += [f"line {line}"] if line is not None else []
        where += [f"({source})"] if source else []
        at = f" at {address:#x}" if address is not None else ""
        tail = f": {text}" if text else ""
        super().__init__(f"{' '.join(where)}: {what}{at}{tail}" if where else f"{what}{at}{tail}")


def bf16_to_f32(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(f):
    u = np.ascontiguousarray(f, np.float32).view(np.uint32)
    r = ((u.astype(np.uint64) + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(f), np.uint16(0x7FFF), r)


PACKED = {"bf16x2": "b32", "f16x2": "b32", "f32x2": "b64", "bf16": "b16"}


def numbers(bits: np.ndarray, ty: str) -> np.ndarray:
    """The array as numbers: bf16 as float32, packed pairs as two elements a thread."""
    if ty in ("bf16", "bf16x2"):
        return bf16_to_f32(np.ascontiguousarray(bits).view(np.uint16))
    if ty in ("f16x2", "f32x2"):
        return np.ascontiguousarray(bits).view(NP[ty[:3]])
    return bits.view(NP[ty])


def packed(v: np.ndarray, ty: str) -> np.ndarray:
    """The inverse of `numbers`, rounding to the type."""
    if ty in ("bf16", "bf16x2"):
        v = f32_to_bf16(v)
    return np.ascontiguousarray(v).view(NP[PACKED[ty]]) if ty in PACKED else v
