"""tcgen05: Blackwell's tensor memory and the products that accumulate in it (one-block forms).

Tensor memory of a block is 128 lanes by 512 columns of 32 bits; an address is lane << 16 | column.
A product runs on its own: its result and its reads of shared memory are ordered for a thread that
has waited on the mbarrier of a later `commit`.
"""

from __future__ import annotations

import re

import numpy as np

from .parser import Instr
from .registers import Mask
from .tensor_cores import elements
from .wgmma import SIZE, Wgmma, chunks, numbers16

LANES, COLUMNS = 128, 512
SPAN = {0: (16, 0), 2: (128, 3), 4: (64, 2), 6: (32, 1)}  # layout code: bytes of a row, XOR bits
FORMAT = {"f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}}


def tile_lanes(rows: int) -> np.ndarray:
    """Lanes of a tile's rows; of 64 rows each quadrant of lanes holds sixteen."""
    row = np.arange(rows)
    return row if rows == LANES else row // 16 * 32 + row % 16


class Tcgen05(Wgmma):
    """alloc, dealloc, st, ld, wait, mma, commit."""

    def prepare(self) -> None:
        super().prepare()
        self.uses_tmem = any(i.op[0] == "tcgen05" for i in self.k.code)
        blocks = len(self.blocks) if self.uses_tmem else 0
        self.tmem = np.zeros((blocks, LANES, COLUMNS), np.uint32)
        self.tmem_init = np.zeros((blocks, LANES, COLUMNS), np.bool_)
        self.tmem_owned = np.zeros((blocks, COLUMNS), np.bool_)
        self.product_epoch = np.zeros((blocks, COLUMNS), np.int32)  # of the last mma on a column
        self.commits = np.zeros(blocks, np.int32)
        # Epochs of the four warps' stores and loads, as seen by later products.
        self.stored = np.zeros((blocks, self.warps, COLUMNS), np.int32)
        self.loaded = np.zeros((blocks, self.warps, COLUMNS), np.int32)
        self.storing: dict[int, list[np.ndarray]] = {}  # row: columns not waited for
        self.loading: dict[int, list[np.ndarray]] = {}

    def op_tcgen05(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if "cta_group::2" in mods:
            raise self.fault(f"opcode not known: {ins.text}")
        lanes = self.lanes(act)
        rows = np.unique(self.row[lanes])
        kind = ".".join(mods[:1])
        if kind == "alloc":
            self._alloc(args, lanes, rows)
        elif kind == "dealloc":
            self._dealloc(args, rows)
        elif kind in ("ld", "st"):
            self._move(ins, mods, args, rows, kind == "ld", act)
        elif kind == "wait::ld":
            for row in rows.tolist():
                self.loading.pop(row, None)
        elif kind == "wait::st":
            for row in rows.tolist():
                self.storing.pop(row, None)
        elif kind == "mma":
            for lane in lanes.tolist():
                self._product(ins, mods, args, lane)
        elif kind == "commit":
            for lane in lanes.tolist():
                self._commit(args, lane)
        elif not kind.startswith(("relinquish_alloc_permit", "fence::")):
            raise self.fault(f"opcode not known: {ins.text}")

    def _agent_of(self, slot: int) -> int:
        return self.clocks.wgmma + slot % self.cluster * self.clocks.groups

    def _alloc(self, args: list[str], lanes: np.ndarray, rows: np.ndarray) -> None:
        for row in rows.tolist():
            first = row * 32
            slot, count = int(self.slot[first]), int(self.val(args[1], "u32")[first])
            if count < 32 or count & (count - 1) or count > COLUMNS:
                raise self.fault(f"tensor memory of {count} columns: not a power of two", first)
            free = [
                c for c in range(0, COLUMNS - count + 1, 32)
                if not self.tmem_owned[slot, c : c + count].any()
            ]  # fmt: skip
            if not free:
                raise self.fault(f"no {count} columns of tensor memory are free", first)
            self.tmem_owned[slot, free[0] : free[0] + count] = True
            self.tmem_init[slot, :, free[0] : free[0] + count] = False
            who = np.array([first])
            at = self.shared_index(self.addr(args[0])[who], who, 4)
            self.shared_write(at, who, np.array([[free[0]]], np.uint32).view(np.uint8))

    def _dealloc(self, args: list[str], rows: np.ndarray) -> None:
        for row in rows.tolist():
            slot, column = int(self.slot[row * 32]), int(self.val(args[0], "u32")[row * 32])
            count = int(self.val(args[1], "u32")[row * 32])
            if not self.tmem_owned[slot, column : column + count].all():
                raise self.fault("dealloc of tensor memory that was not allocated", row * 32)
            self._see_product(row, slot, np.arange(column, column + count), "dealloc")
            for other in self.loading:
                if int(self.slot[other * 32]) == slot:
                    what = f"dealloc before the tcgen05.wait::ld of warp {other % self.warps}"
                    raise self.fault(what, row * 32)
            self.tmem_owned[slot, column : column + count] = False

    def _see_product(self, row: int, slot: int, columns: np.ndarray, what: str) -> None:
        newest = int(self.product_epoch[slot, columns].max())
        if self.clocks.clock[row, 0, self._agent_of(slot)] < newest:
            why = f"tcgen05.{what} of columns whose mma has not been waited for"
            raise self.fault(why, row * 32)

    def _cells(
        self, mods: list[str], args: list[str], ld: bool, row: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(lane, column) of tensor memory for each `[thread of the warp, register]`."""
        first = row * 32
        where = args[1] if ld else args[0]
        address = int(self.addr(where)[first])
        lane0, column = address >> 16, address & 0xFFFF
        quad = row % self.warps % 4 * 32
        thread, reg = np.meshgrid(np.arange(32), np.arange(count), indexing="ij")
        shape = next(q for q in mods if re.match(r"\d+x\d+b", q))
        if shape == "32x32b":
            lane, col = thread, reg
        elif shape == "16x32bx2":
            split = int(args[2] if ld else args[1], 0)
            lane, col = thread % 16, reg + thread // 16 * split
        elif shape == "16x256b":
            lane, col = thread // 4 + reg // 2 % 2 * 8, reg // 4 * 8 + thread % 4 * 2 + reg % 2
        elif shape == "16x128b":
            lane, col = thread // 4 + reg % 2 * 8, reg // 2 * 4 + thread % 4
        else:
            raise self.fault(f"opcode not known: tcgen05 shape {shape}", first)
        if lane0 // 32 * 32 != quad:
            what = f"warp {row % self.warps} may not reach tensor-memory lane {lane0}"
            raise self.fault(what, first)
        return lane0 + lane, column + col

    def _move(
        self, ins: Instr, mods: list[str], args: list[str], rows: np.ndarray, ld: bool, act: Mask
    ) -> None:
        if any(q.startswith(("pack", "unpack", "red")) for q in mods):
            raise self.fault(f"opcode not known: {ins.text}")
        regs = self.vec(args[0] if ld else args[-1])
        out = np.zeros((len(regs), self.n), np.uint32)
        data = None if ld else np.stack([self.val(q, "b32") for q in regs], 1)
        for row in rows.tolist():
            slot, first = int(self.slot[row * 32]), row * 32
            lane, column = self._cells(mods, args, ld, row, len(regs))
            columns = np.unique(column)
            if columns[-1] >= COLUMNS or not self.tmem_owned[slot, columns].all():
                raise self.fault("tensor memory outside every allocation", first, int(columns[-1]))
            self._see_product(row, slot, columns, "ld" if ld else "st")
            warp, epoch = row % self.warps, int(self.clocks.epoch(np.array([row]))[0])
            if ld:
                if not self.tmem_init[slot, lane, column].all():
                    raise self.fault("read of uninitialised tensor memory", first)
                if any(np.isin(c, columns).any() for c in self.storing.get(row, [])):
                    raise self.fault("tcgen05.ld before the store was waited for", first)
                out[:, first : first + 32] = self.tmem[slot, lane, column].T
                self.loaded[slot, warp, columns] = epoch
                self.loading.setdefault(row, []).append(columns)
            else:
                assert data is not None
                self.tmem[slot, lane, column] = data[first : first + 32]
                self.tmem_init[slot, lane, column] = True
                self.stored[slot, warp, columns] = epoch
                self.storing.setdefault(row, []).append(columns)
        if ld:
            for reg, v in zip(regs, out):
                self.put(reg, v, act)

    def _operand(
        self, text: str, lane: int, mn: int, k: int, ty: str, mn_major: bool, epoch: int
    ) -> np.ndarray:
        """`[mn, k]` from a shared-memory descriptor, or for the left one from tensor memory."""
        slot = int(self.slot[lane])
        if text[0] == "[":
            address = int(self.addr(text)[lane])
            lane0, column = address >> 16, address & 0xFFFF
            columns = np.arange(column, column + k * SIZE[ty] // 4)
            self._ordered_after(slot, int(self.row[lane]), columns, lane)
            cells = (slot, (lane0 + tile_lanes(mn))[:, None], columns[None, :])
            if not self.tmem_init[cells].all():
                raise self.fault("tcgen05.mma reads uninitialised tensor memory", lane)
            found = elements(ty, self.tmem[cells])
            assert found is not None
            return found.reshape(mn, k)
        desc = int(self.val(text, "u64")[lane])
        span, bits = SPAN[desc >> 61 & 7]
        leading, stride = (desc >> 16 & 0x3FFF) << 4, (desc >> 32 & 0x3FFF) << 4
        at = ((desc & 0x3FFF) << 4) + chunks(mn, k, SIZE[ty], leading, stride, span, mn_major)
        if bits:
            at = at ^ (at >> 7 & (1 << bits) - 1) << 4
        if at.max() + 16 > self.limit:
            raise self.fault("tcgen05 descriptor reaches past shared memory", lane, int(at.max()))
        flat = at.reshape(-1) + slot * self.stride
        lanes = np.full(len(flat), lane)
        self.check_written(flat, lanes, 16)
        g, rows = self.granules(flat, 16, np.full(len(flat), self.row[lane]))
        agent, when = np.full(len(g), self._agent_of(slot)), np.full(len(g), epoch)
        self.raise_race(self.races.read(g, rows, None, agent, when), g, flat, lanes)
        tile = numbers16(self.smem.reshape(-1, 16)[flat // 16], ty).reshape(at.shape[0], -1)
        return tile.T if mn_major else tile

    def _product(self, ins: Instr, mods: list[str], args: list[str], lane: int) -> None:
        kind = next((q[6:] for q in mods if q.startswith("kind::")), "")
        desc = int(self.val(args[3], "u32")[lane])
        ty = FORMAT.get(kind, {}).get(desc >> 7 & 7)
        m, n = (desc >> 24 & 31) << 4, (desc >> 17 & 63) << 3
        unknown = (
            len(args) > 5 or desc >> 4 & 3 != 1 or ty != FORMAT.get(kind, {}).get(desc >> 10 & 7)
        )
        if ty is None or unknown or m not in (64, 128) or any(q in mods for q in ("sp", "ws")):
            raise self.fault(
                f"opcode not known: {ins.text} (instruction descriptor {desc:#x})", lane
            )
        k, slot, row = 32 // SIZE[ty], int(self.slot[lane]), int(self.row[lane])
        epoch = int(self.commits[slot]) + 1
        a = self._operand(args[1], lane, m, k, ty, bool(desc >> 15 & 1), epoch)
        b = self._operand(args[2], lane, n, k, ty, bool(desc >> 16 & 1), epoch)
        address = int(self.addr(args[0])[lane])
        lane0, column = address >> 16, address & 0xFFFF
        columns = np.arange(column, column + n)
        if columns[-1] >= COLUMNS or not self.tmem_owned[slot, columns].all():
            raise self.fault("tensor memory outside every allocation", lane, int(columns[-1]))
        self._ordered_after(slot, row, columns, lane)
        cells = (slot, (lane0 + tile_lanes(m))[:, None], columns[None, :])
        sign = np.float32((-1) ** ((desc >> 13 & 1) + (desc >> 14 & 1)))
        product = sign * (a @ b.T)
        if bool(self.pval(args[4])[lane]):
            if not self.tmem_init[cells].all():
                raise self.fault("tcgen05.mma adds to uninitialised tensor memory", lane)
            product = self.tmem[cells].view(np.float32) + product
        self.tmem[cells] = np.ascontiguousarray(product, np.float32).view(np.uint32)
        self.tmem_init[cells] = True
        self.product_epoch[slot, columns] = epoch
        self.m.count["mma_flops"] += 2 * m * n * k

    def _ordered_after(self, slot: int, row: int, columns: np.ndarray, lane: int) -> None:
        """The warps' stores to and loads from the columns must be ordered before the product."""
        first = slot % self.cluster * self.warps
        seen = self.clocks.clock[row, 0, first : first + self.warps]
        for name, when in (("st", self.stored), ("ld", self.loaded)):
            late = when[slot][:, columns].max(1) > seen
            late[row % self.warps] = False
            if late.any():
                what = (
                    f"tcgen05.mma is not ordered after a tcgen05.{name} by warp {np.argmax(late)}"
                )
                raise self.fault(what, lane)
        # ptxas tracks the registers of a tcgen05.ld, and Triton reads them before its wait::ld;
        # what the wait must precede is the next use of the columns.
        for name, pending in (("st", self.storing), ("ld", self.loading)):
            for other, parts in pending.items():
                mine = int(self.slot[other * 32]) == slot
                if mine and any(np.isin(columns, c).any() for c in parts):
                    what = f"no tcgen05.wait::{name} by warp {other % self.warps} before this mma"
                    raise self.fault(what, lane)

    def _commit(self, args: list[str], lane: int) -> None:
        slot = int(self.slot[lane])
        self.commits[slot] += 1
        epoch, agent = int(self.commits[slot]), self._agent_of(slot)
        who = np.array([lane])
        b = self.mbarrier(int(self.shared_index(self.addr(args[0])[who], who, 8)[0]), lane)

        def finish() -> None:
            b.clock[0, agent] = max(int(b.clock[0, agent]), epoch)
            self.arrive(b, 1, lane)

        b.copies.append(finish)

    def block_ends(self, slot: int) -> None:
        super().block_ends(slot)
        if self.uses_tmem and self.tmem_owned[slot].any():
            raise self.fault("block exits without giving tensor memory back", slot * self.per)
