"""wgmma: warpgroup products of shared-memory tiles, with their fence, commit and wait."""

from __future__ import annotations

import functools

import numpy as np

from .formats import bf16_to_f32
from .parser import Instr
from .registers import Mask
from .tensor_cores import TensorCores, elements, shape_of

SWIZZLE = {0: 0, 1: 3, 2: 2, 3: 1}  # descriptor code: bits of the XOR
SPAN = {0: 16, 1: 128, 2: 64, 3: 32}  # descriptor code: bytes of a swizzled row
SIZE = {"bf16": 2, "f16": 2, "tf32": 4}


@functools.lru_cache(512)
def chunks(
    mn: int, k: int, size: int, leading: int, stride: int, span: int, mn_major: bool
) -> np.ndarray:
    """Offsets `[rows, chunks]` of the 16-byte chunks of a tile, before the swizzle.

    K-major: a row is a row of the tile. MN-major: a row is one k, its chunks run along mn.
    """
    rows, length = (k, mn) if mn_major else (mn, k)
    i = np.arange(rows)[:, None]
    c = np.arange(length * size // 16)[None, :] * 16
    return i // 8 * stride + i % 8 * span + c % span + c // span * leading


def numbers16(data: np.ndarray, ty: str) -> np.ndarray:
    """Bytes `[..., 16]` as float32 elements."""
    if ty == "bf16":
        return bf16_to_f32(data.view(np.uint16))
    if ty == "f16":
        return data.view(np.float16).astype(np.float32)
    return (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


class Wgmma(TensorCores):
    """The Hopper tensor-core instructions."""

    def prepare(self) -> None:
        super().prepare()
        groups = max(1, self.n // 128)
        self.fenced_at = np.zeros(groups, np.int64)  # step of the last wgmma.fence
        self.committed = np.zeros(groups, np.int64)
        # (registers, commit group a warpgroup's use belongs to or -1)
        self.in_flight: list[tuple[frozenset[str], np.ndarray]] = []
        self.flying: set[str] = set()

    def op_wgmma(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if self.per % 128:
            raise self.fault("wgmma needs whole warpgroups: the block is no multiple of 128")
        groups = np.nonzero(self.active(act).reshape(-1, 128).any(1))[0]
        if not self.active(act).reshape(-1, 128)[groups].all():
            raise self.fault("wgmma reached by part of a warpgroup (divergent)")
        if mods[0] == "fence":
            self.fenced_at[groups] = self.step
        elif mods[0] == "commit_group":
            self.committed[groups] += 1
        elif mods[0] == "wait_group":
            self._wait_groups(groups, int(args[0], 0))
        elif mods[0] == "mma_async":
            self._multiply(ins, mods, args, act, groups)
        else:
            raise self.fault(f"opcode not known: {ins.text}")

    def _wait_groups(self, groups: np.ndarray, keep: int) -> None:
        done = self.committed - keep
        left = []
        for names, group in self.in_flight:
            group = group.copy()
            mine = group[groups]
            group[groups] = np.where(mine < done[groups], -1, mine)
            if (group >= 0).any():
                left.append((names, group))
        self.in_flight = left
        self.flying = set().union(*(names for names, _ in left))
        for g in groups.tolist():
            if done[g] > 0:
                rows = np.arange(4 * g, 4 * g + 4)
                self.clocks.learn(rows, self._agent(g), int(done[g]))

    def _agent(self, group: int) -> int:
        """The pseudo-agent of a warpgroup's unit."""
        block, inside = divmod(group, self.per // 128)
        return self.clocks.wgmma + block % self.cluster * self.clocks.groups + inside

    def refuse_flying(self, ins: Instr, act: Mask) -> None:
        """An ordinary instruction may not touch the registers of a wgmma not yet waited for."""
        groups = np.nonzero(self.active(act).reshape(-1, 128).any(1))[0]
        for names, group in self.in_flight:
            both = names & ins.words
            if both and (group[groups] >= 0).any():
                g = int(groups[np.argmax(group[groups] >= 0)])
                what = f"{sorted(both)[0]} belongs to a wgmma that has not been waited for"
                raise self.fault(what, g * 128)

    def _multiply(
        self, ins: Instr, mods: list[str], args: list[str], act: Mask, groups: np.ndarray
    ) -> None:
        m, n, k = shape_of(mods)
        out, left, right = mods[-3], mods[-2], mods[-1]
        if out != "f32" or left not in SIZE or right != left:
            raise self.fault(f"opcode not known: {ins.text}")
        d, registers = self.vec(args[0]), args[1][0] == "{"
        add, sign = self.pval(args[3])[groups * 128], int(args[4]) * int(args[5])
        turned = [int(q) for q in args[6:]]
        turn_a = turned[0] if len(turned) == 2 else 0
        turn_b = turned[-1] if turned else 0
        inputs = self.vec(args[1]) if registers else []
        self._check_fenced([*d, *inputs], groups)
        if registers:
            e = elements(left, np.stack([self.val(q, "b32") for q in inputs], 1))
            assert e is not None
            a = self._register_tile(e.reshape(-1, 4, 8, 4, 4, e.shape[-1])[groups])
        else:
            a = self.shared_tile(self.val(args[1], "u64"), groups, m, k, left, turn_a)
        b = self.shared_tile(self.val(args[2], "u64"), groups, n, k, left, turn_b)
        product = np.matmul(a, b.transpose(0, 2, 1)) * np.float32(sign)
        # Rows split as (warp, half, group), columns as (register quad, place, element).
        order = product.reshape(len(groups), 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        flat = np.ascontiguousarray(order).reshape(n // 2, len(groups) * 128)
        threads = (groups[:, None] * 128 + np.arange(128)).reshape(-1)
        whole = len(threads) == self.n
        keep = np.repeat(add, 128)
        for i, name in enumerate(d):
            v = flat[i]
            if add.any():
                old = self.raw(name).view(np.float32)
                v = np.where(keep, old if whole else old[threads], np.float32(0)) + v
            if whole:
                self.r[name] = v.view(np.uint32)
                self.undefined.pop(name, None)
            else:
                full = self.old(name).copy()
                full[threads] = v.view(np.uint32)
                fresh = name not in self.r
                self.r[name] = full
                if fresh or name in self.undefined:
                    missing = np.ones(self.n, bool) if fresh else self.undefined[name].copy()
                    missing[threads] = False
                    self.undefined[name] = missing
        names = frozenset([*d, *inputs])
        group = np.full(len(self.committed), -1, np.int64)
        group[groups] = self.committed[groups]
        self.in_flight.append((names, group))
        self.flying |= names
        self.m.count["mma_flops"] += 2 * m * n * k * len(groups)

    def _register_tile(self, e: np.ndarray) -> np.ndarray:
        """Fragments `[group, warp, row, place, register, element]` as tiles `[group, 64, k]`."""
        g, w, r, p, regs, per = e.shape
        split = e.reshape(g, w, r, p, regs // 2, 2, per)  # register = 2 * column half + row half
        return split.transpose(0, 1, 5, 2, 4, 3, 6).reshape(g, 64, regs // 2 * p * per)

    def _check_fenced(self, names: list[str], groups: np.ndarray) -> None:
        for q in names:
            late = (
                self.written_at[q][groups] > self.fenced_at[groups] if q in self.written_at else 0
            )
            if np.any(late):
                g = int(groups[np.argmax(late)])
                raise self.fault(f"no wgmma.fence since {q} was written", g * 128)

    def shared_tile(
        self, descriptors: np.ndarray, groups: np.ndarray, mn: int, k: int, ty: str, mn_major: int
    ) -> np.ndarray:
        """Tiles `[group, mn, k]` that the matrix descriptors of the warpgroups name."""
        desc = descriptors[groups * 128].astype(np.int64)
        start = (desc & 0x3FFF) << 4
        layout = desc & ~np.int64(0x3FFF)
        out = None
        for kind in np.unique(layout).tolist():
            sel = np.nonzero(layout == kind)[0]
            leading, stride = (kind >> 16 & 0x3FFF) << 4, (kind >> 32 & 0x3FFF) << 4
            code = kind >> 62 & 3
            span = SPAN[code]
            offset = chunks(mn, k, SIZE[ty], leading, stride, span, bool(mn_major))
            at = start[sel, None, None] + offset
            if code:
                at = at ^ (at >> 7 & (1 << SWIZZLE[code]) - 1) << 4
            data = self._tile_bytes(at, groups[sel])
            tile = numbers16(data, ty).reshape(len(sel), offset.shape[0], -1)
            if mn_major:
                tile = tile.transpose(0, 2, 1)
            if len(sel) == len(groups):
                return tile
            out = np.empty((len(groups), mn, k), np.float32) if out is None else out
            out[sel] = tile
        assert out is not None
        return out

    def _tile_bytes(self, at: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Bytes `[group, rows, chunks, 16]`, checked and recorded as reads by the wgmma units."""
        first = groups * 128
        if at.max() + 16 > self.limit:
            i = int(np.argmax(at.reshape(len(groups), -1).max(1)))
            raise self.fault("wgmma descriptor reaches past shared memory", first[i], int(at.max()))
        shape = at.shape
        flat = (at + self.base[first][:, None, None]).reshape(-1)
        lanes = np.repeat(first, shape[1] * shape[2])
        self.check_written(flat, lanes, 16)
        agents = np.array([self._agent(g) for g in groups.tolist()])
        g, who = self.granules(flat, 16, np.repeat(np.arange(len(groups)), shape[1] * shape[2]))
        epoch = self.committed[groups][who] + 1
        for warp in range(4):
            found = self.races.read(g, groups[who] * 4 + warp, None, agents[who], epoch)
            self.raise_race(found, g, flat, lanes)
        return self.smem.reshape(-1, 16).take(flat // 16, axis=0).reshape(*shape, 16)
