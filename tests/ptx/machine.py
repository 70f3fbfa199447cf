"""The device: global memory with its allocations, tensor maps, counters and the launch."""

from __future__ import annotations

import collections

import numpy as np

from .block import Cta
from .formats import GBASE, NP, WIDTH


class Machine:
    def __init__(self, arena=1 << 28) -> None:
        self.mem = np.full(arena, 203, np.uint8)
        self.ok = np.zeros(arena, np.bool_)
        self.top = 4096
        self.init = np.zeros(arena, np.bool_)
        self.allocs, self.count, self.tmaps = ({}, collections.Counter(), {})

    def put(self, a, poison=False) -> None:
        a = np.ascontiguousarray(a)
        n = a.nbytes
        base = self.top
        self.mem[base : base + n] = a.view(np.uint8).reshape(-1) if a.size else 0
        self.ok[base : base + n] = True
        self.init[base : base + n] = not poison
        if poison:
            self.mem[base : base + n] = 255
        self.top = (base + n + 4096 + 511) // 512 * 512
        self.allocs[GBASE + base] = (a.dtype, a.shape)
        return GBASE + base

    def empty(self, shape, dtype):
        return self.put(np.zeros(shape, dtype), poison=True)

    def get(self, addr: np.ndarray):
        dt, sh = self.allocs[addr]
        n = int(np.prod(sh)) * dt.itemsize
        o = addr - GBASE
        return self.mem[o : o + n].copy().view(dt).reshape(sh)

    def unwritten(self, addr: np.ndarray):
        dt, sh = self.allocs[addr]
        n = int(np.prod(sh)) * dt.itemsize
        o = addr - GBASE
        return int((~self.init[o : o + n]).sum()) // dt.itemsize

    def tensor_map(self, addr: np.ndarray, dims, strides, box, elem, swizzle=0, oob=0):
        h = 2046820352 + len(self.tmaps)
        self.tmaps[h] = (addr - GBASE, list(dims), list(strides), list(box), elem, swizzle)
        raw = np.zeros(128, np.uint8)
        raw[:8] = np.array([h], np.uint64).view(np.uint8)
        return raw

    def launch(self, mod, name: str, grid, block, args: list[str], smem=0, max_steps=50000000):
        k = mod.kernels[name]
        grid = tuple(grid) + (1,) * (3 - len(grid))
        block = (block, 1, 1) if isinstance(block, int) else tuple(block) + (1,) * (3 - len(block))
        pv, _off = ({}, 0)
        blob = bytearray()
        for (n, ty, size), v in zip(k.params, args):
            al = 64 if size and size >= 128 else min(8, size) if size else WIDTH[ty]
            while len(blob) % al:
                blob.append(0)
            pv[n] = len(blob)
            if size:
                blob += bytes(np.asarray(v).view(np.uint8))
            else:
                blob += np.array([v]).astype(NP[ty]).tobytes()
        for n, _, size in k.params[len(args) :]:
            pv[n] = len(blob)
            blob += bytes(size or 8)
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    Cta(
                        self,
                        k,
                        (x, y, z),
                        grid,
                        block,
                        pv,
                        np.frombuffer(bytes(blob), np.uint8),
                        smem,
                    ).run(max_steps)
