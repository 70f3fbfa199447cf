"""The device: global memory with its allocations, tensor maps, counters and the launch."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .block import Cta
from .formats import GBASE, NP, WIDTH
from .parser import Module


class Machine:
    """Global memory of `arena` bytes (touched lazily) and everything counted while kernels run."""

    def __init__(self, arena: int = 1 << 28) -> None:
        self.mem = np.zeros(arena, np.uint8)
        self.ok = np.zeros(arena, np.bool_)  # inside an allocation
        self.init = np.zeros(arena, np.bool_)  # written since it was allocated
        self.owner = np.zeros(0, np.int32)  # number of the block that wrote a byte in this launch
        self.top = 4096
        self.allocs: dict[int, tuple[np.dtype, tuple[int, ...]]] = {}
        self.count: collections.Counter[str] = collections.Counter()
        self.tmaps: dict[int, tuple[Any, ...]] = {}

    def put(self, a: np.ndarray, poison: bool = False) -> int:
        """Device address of a copy of `a`; guard space follows every allocation."""
        a = np.ascontiguousarray(a)
        base, end = self.top, self.top + a.nbytes
        if end > len(self.mem):
            raise MemoryError(f"the arena of {len(self.mem)} bytes is full")
        self.mem[base:end] = 0xFF if poison or not a.size else a.view(np.uint8).reshape(-1)
        self.ok[base:end] = True
        self.init[base:end] = not poison
        self.top = (end + 4096 + 511) // 512 * 512
        self.allocs[GBASE + base] = (a.dtype, a.shape)
        return GBASE + base

    def empty(self, shape: tuple[int, ...], dtype: Any) -> int:
        """Device address of fresh memory, poisoned: reading it before a write is an error."""
        return self.put(np.zeros(shape, dtype), poison=True)

    def _span(self, addr: int) -> slice:
        dtype, shape = self.allocs[addr]
        return slice(addr - GBASE, addr - GBASE + int(np.prod(shape)) * dtype.itemsize)

    def get(self, addr: int) -> np.ndarray:
        """A copy of the allocation at `addr`, with the dtype and shape it was put with."""
        dtype, shape = self.allocs[addr]
        return self.mem[self._span(addr)].copy().view(dtype).reshape(shape)

    def unwritten(self, addr: int) -> int:
        """How many elements' worth of the allocation's bytes no one has written."""
        return int((~self.init[self._span(addr)]).sum()) // self.allocs[addr][0].itemsize

    def tensor_map(
        self,
        addr: int,
        dims: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        elem: int,
        swizzle: int = 0,
    ) -> np.ndarray:
        """A 128-byte tensor map: innermost dimension first, strides in bytes without the first."""
        handle = 0x7A00_0000 + len(self.tmaps)
        self.tmaps[handle] = (addr - GBASE, list(dims), list(strides), list(box), elem, swizzle)
        raw = np.zeros(128, np.uint8)
        raw[:8] = np.array([handle], np.uint64).view(np.uint8)
        return raw

    def launch(
        self,
        mod: Module,
        name: str,
        grid: Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        smem: int = 0,
        max_steps: int = 50_000_000,
        reverse: bool = False,
    ) -> None:
        """Run every block of the grid, one after another (backwards with `reverse`)."""
        kernel = mod.kernels[name]
        grid3 = (*grid, 1, 1)[:3]
        block3 = (block, 1, 1) if isinstance(block, int) else (*block, 1, 1)[:3]
        offsets: dict[str, int] = {}
        blob = bytearray()
        for i, (param, ty, size) in enumerate(kernel.params):
            natural = size if size else WIDTH[ty]
            align = 64 if natural >= 128 else min(8, natural)
            blob += bytes(-len(blob) % align)
            offsets[param] = len(blob)
            if i >= len(args):
                blob += bytes(size or 8)
            elif size:
                blob += bytes(np.asarray(args[i]).view(np.uint8))
            else:
                blob += np.array([args[i]]).astype(NP[ty]).tobytes()
        params = np.frombuffer(bytes(blob), np.uint8)
        self.owner = np.zeros(len(self.mem), np.int32)
        ids = [(x, y, z) for z, y, x in itertools.product(*map(range, grid3[::-1]))]
        for number, cid in enumerate(reversed(ids) if reverse else ids, 1):
            cta = Cta(self, kernel, cid, grid3, block3, offsets, params, smem)
            cta.number = number
            cta.run(max_steps)
