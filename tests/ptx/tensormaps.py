"""Bulk copies (TMA): by tensor map or plain, multicast, stores, st.async, tensormap.replace.

A copy into shared memory completes when a thread first looks at its mbarrier (or nothing else can
run), a copy out of it when its group is waited for: as late as hardware may be.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from .async_copies import AsyncCopies
from .formats import GBASE, SBASE
from .maps import FIELDS, MAP_BYTES, TensorMap, decode, swizzled, tile
from .memory import IN_FLIGHT, gather
from .parser import Instr, split_args
from .registers import Mask


@dataclasses.dataclass
class BulkStore:
    """A copy out of shared memory: `take` reads it, then `give` writes global memory."""

    ins: Instr
    lane: int
    source: np.ndarray
    target: np.ndarray
    unit: int
    reduce: str
    epoch: int
    data: np.ndarray | None = None


class TensorCopies(AsyncCopies):
    """cp.async.bulk, cp.async.bulk.tensor and tensormap.replace."""

    def prepare(self) -> None:
        super().prepare()
        self.async_epoch = 0
        self.open_stores: dict[int, list[BulkStore]] = {}
        self.store_groups: dict[int, list[list[BulkStore]]] = {}

    def bulk(self, ins: Instr, mods: list[str], args: list[str], lanes: np.ndarray) -> None:
        if "prefetch" in mods:
            return
        for lane in lanes.tolist():
            if "commit_group" in mods:
                group = self.open_stores.pop(lane, [])
                self.store_groups.setdefault(lane, []).append(group)
            elif "wait_group" in mods:
                self._wait_stores(lane, int(args[0], 0), "read" in mods)
            else:
                self._copy(ins, mods, args, lane)

    # cp.reduce.async.bulk has the same operands as the store.
    def one(self, text: str, ty: str, lane: int) -> int:
        return int(self.val(text, ty)[lane])

    def _map(self, operand: str, lane: int) -> tuple[TensorMap, list[int]]:
        m = re.match(r"\[\s*(\S+?)\s*,\s*\{(.*)\}\s*\]", operand)
        if not m:
            raise self.fault(f"tensor operand not understood: {operand}", lane)
        address = int(self.val(m[1], "u64")[lane])
        coord = [self.one(c, "s32", lane) for c in split_args(m[2])]
        if address < 1 << 20:
            raw = self.params[address : address + MAP_BYTES]
        else:
            raw = self.m.mem[address - GBASE : address - GBASE + MAP_BYTES]
        t = decode(raw.tobytes())
        if len(coord) != len(t.dims):
            raise self.fault(f"{len(coord)} coordinates for a map of rank {len(t.dims)}", lane)
        if t.address % 16 or any(s % 16 for s in t.strides):
            raise self.fault("tensor map whose base or strides are not multiples of 16", lane)
        return t, coord

    def _copy(self, ins: Instr, mods: list[str], args: list[str], lane: int) -> None:
        tensor = "tensor" in mods
        spaces = [q for q in mods if q in ("global", "shared::cta", "shared::cluster")]
        out = bool(spaces) and spaces[0] == "global"
        who = np.array([lane])
        if any(q.startswith(("im2col", "tile::")) for q in mods):
            raise self.fault(f"opcode not known: {ins.text}", lane)
        if tensor:
            t, coord = self._map(args[0] if out else args[1], lane)
            offset, address, inside, unit = tile(t, coord)
            size, swizzle = t.bytes, t.swizzle
        else:
            size, swizzle, unit = self.one(args[2], "u32", lane), 0, 16
            if size % 16:
                raise self.fault(f"bulk copy of {size} bytes, no multiple of 16", lane)
            offset = np.arange(0, size, 16)
            inside = np.ones(len(offset), np.bool_)
            address = int(self.addr(args[0] if out else args[1])[lane]) + offset
        local = self.addr(args[1] if out else args[0])[who]
        start = int(self.shared_index(local, who, 128 if tensor else 16)[0])
        if start % self.stride + size > self.limit:
            what = f"bulk copy of {size} bytes leaves shared memory ({self.limit} bytes)"
            raise self.fault(what, lane, start % self.stride)
        at = swizzled(start + offset, swizzle)
        if out:
            reduce = next((q for q in mods if q in ("add", "min", "max")), "")
            self._begin_store(ins, lane, at[inside], address[inside], unit, reduce)
            return
        if not tensor and spaces[-1] == "shared::cta" and len(spaces) > 1:
            source = self.shared_index(address % (1 << 32), np.full(len(at), lane), 16)
            self._begin_load(ins, lane, at, None, source, inside, unit, args[3])
            return
        mask = None
        if "multicast::cluster" in mods:
            mask = self.one(args[3 if tensor else 4], "u32", lane)
        bar = args[2 if tensor else 3]
        if mask is None:
            self._begin_load(ins, lane, at, address, None, inside, unit, bar)
            return
        first = int(self.slot[lane]) // self.cluster * self.cluster
        own = start // self.stride
        for rank in range(self.cluster):
            if mask >> rank & 1:
                move = (first + rank - own) * self.stride
                self._begin_load(ins, lane, at + move, address, None, inside, unit, bar, rank)

    def _begin_load(
        self, ins: Instr, lane: int, at: np.ndarray, address: np.ndarray | None,
        source: np.ndarray | None, inside: np.ndarray, unit: int, bar: str, rank: int = -1,
    ) -> None:  # fmt: skip
        """Into shared memory: the old content is gone now, the new one is there at completion."""
        who = np.array([lane])
        where = int(self.shared_index(self.addr(bar)[who], who, 8)[0])
        if rank >= 0:
            first = int(self.slot[lane]) // self.cluster * self.cluster
            where = (first + rank) * self.stride + where % self.stride
        b = self.mbarrier(where, lane)
        self._needs_init_seen(b, who)
        self.async_epoch += 1
        epoch = self.async_epoch
        g, rows = self.granules(at, unit, np.full(len(at), self.row[lane]))
        found = self.races.write(g, rows, None, np.ones(len(g), np.bool_), b.column, epoch)
        self.raise_race(found, g, at, np.full(len(at), lane))
        self.sinit.reshape(-1, unit)[at // unit] = IN_FLIGHT
        self.smem.reshape(-1, unit)[at // unit] = 0xCD

        # The copy may read at once, so what it reads must be there, and seen, when it is issued.
        where = None
        if source is None and inside.any():
            assert address is not None
            lanes = np.full(int(inside.sum()), lane)
            where = self.global_index(address[inside], lanes, unit, True)
            self.global_race(where, lanes, unit, False, bulk=True)

        def land() -> None:
            before, self.ins = self.ins, ins
            data = np.zeros((len(at), unit), np.uint8)
            if source is not None:
                data[:] = gather(self.smem, source, unit)
            elif where is not None:
                assert address is not None
                data[inside] = gather(self.m.mem, where, unit)
                sectors = len(np.unique(address[inside] // 32))
                self.m.counters.bulk(ins, True, len(lanes) * unit, sectors)
            self.smem.reshape(-1, unit)[at // unit] = data
            self.sinit.reshape(-1, unit)[at // unit] = 1
            b.clock[0, b.column] = max(int(b.clock[0, b.column]), epoch)
            b.tx -= len(at) * unit
            self.ins = before
            self.try_complete(b)

        b.copies.append(land)

    def _begin_store(
        self, ins: Instr, lane: int, at: np.ndarray, address: np.ndarray, unit: int, reduce: str
    ) -> None:
        """Out of shared memory: reads it until its group has been waited for."""
        lanes = np.full(len(at), lane)
        self.check_written(at, lanes, unit)
        self.async_epoch += 1
        row = int(self.row[lane])
        column = self.clocks.bulk + int(self.clocks.own[row])
        g, rows = self.granules(at, unit, np.full(len(at), row))
        agent, epoch = np.full(len(g), column), np.full(len(g), self.async_epoch)
        self.raise_race(self.races.read(g, rows, None, agent, epoch), g, at, lanes)
        self.open_stores.setdefault(lane, []).append(
            BulkStore(ins, lane, at, address, unit, reduce, self.async_epoch)
        )

    def _wait_stores(self, lane: int, keep: int, read_only: bool) -> None:
        groups = self.store_groups.get(lane, [])
        row = np.array([self.row[lane]])
        column = self.clocks.bulk + int(self.clocks.own[row[0]])
        for group in groups[: len(groups) - keep]:
            for store in group:
                self._take(store)
                self.clocks.learn(row, column, store.epoch)
                if not read_only:
                    self._give(store)
        if not read_only:
            self.store_groups[lane] = groups[len(groups) - keep :] if keep else []

    def _take(self, store: BulkStore) -> None:
        if store.data is None:
            store.data = gather(self.smem, store.source, store.unit)

    def _give(self, store: BulkStore) -> None:
        before, self.ins = self.ins, store.ins
        assert store.data is not None
        lanes = np.full(len(store.target), store.lane)
        if len(lanes):
            data = store.data
            if store.reduce:
                data = self._reduced(store, lanes)
            self.global_write(store.target, lanes, data, bool(store.reduce), bulk=True)
            sectors = len(np.unique(store.target // 32))
            self.m.counters.bulk(store.ins, False, len(lanes) * store.unit, sectors)
        self.ins = before

    def _reduced(self, store: BulkStore, lanes: np.ndarray) -> np.ndarray:
        from .atomics import ATOMIC
        from .formats import numbers, packed

        ty = next(
            (q for q in reversed(store.ins.op) if q in ("f32", "f16", "bf16", "u32", "s32")), ""
        )
        if not ty:
            raise self.fault("reduction type of a bulk copy not known", store.lane)
        old = self.global_read(store.target, lanes, store.unit, True)
        width = {"f16": np.uint16, "bf16": np.uint16}.get(ty, np.uint32)
        assert store.data is not None
        x, y = (numbers(np.ascontiguousarray(v).view(width), ty) for v in (old, store.data))
        return np.ascontiguousarray(packed(ATOMIC[store.reduce](x, y), ty)).view(np.uint8)

    def op_st(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        if mods[0] != "async":
            super().op_st(ins, mods, args, act)
            return
        lanes = self.lanes(act)
        values = [self.val(v, mods[-1])[lanes] for v in self.vec(args[1])]
        data = np.ascontiguousarray(np.stack(values, 1)).view(np.uint8)
        at = self.shared_index(self.addr(args[0])[lanes], lanes, data.shape[1])
        bars = self.shared_index(self.addr(args[2])[lanes], lanes, 8)
        for i, lane in enumerate(lanes.tolist()):
            self._store_later(at[i : i + 1], data[i : i + 1], int(bars[i]), lane)

    def _store_later(self, at: np.ndarray, data: np.ndarray, bar: int, lane: int) -> None:
        """st.async: the bytes land when the mbarrier's phase needs them."""
        b, size = self.mbarrier(bar, lane), data.shape[1]
        self.async_epoch += 1
        epoch = self.async_epoch
        g, rows = self.granules(at, size, self.row[[lane]])
        found = self.races.write(g, rows, None, np.ones(len(g), np.bool_), b.column, epoch)
        self.raise_race(found, g, at, np.array([lane]))
        self.sinit.reshape(-1, size)[at // size] = IN_FLIGHT

        def land() -> None:
            self.smem.reshape(-1, size)[at // size] = data
            self.sinit.reshape(-1, size)[at // size] = 1
            b.clock[0, b.column] = max(int(b.clock[0, b.column]), epoch)
            b.tx -= size
            self.try_complete(b)

        b.copies.append(land)

    def block_ends(self, slot: int) -> None:
        """A block's last thread has exited: nothing asynchronous may still use its memory."""
        for lane, groups in list(self.store_groups.items()):
            if self.slot[lane] != slot:
                continue
            for store in (s for group in groups for s in group):
                if store.data is None:
                    self.ins = store.ins
                    what = "block exits while a bulk store still reads its shared memory"
                    raise self.fault(what, lane)
                self._give(store)
            del self.store_groups[lane]
        for lane in self.open_stores:
            if self.slot[lane] == slot:
                raise self.fault("block exits with a bulk store that was never committed", lane)
        for b in self.mbars.values():
            if b.at // self.stride == slot and b.copies:
                for copy in b.copies:
                    copy()
                what = "block exits while copies into its shared memory are in flight"
                raise self.fault(what, slot * self.per, b.at % self.stride)

    def op_tensormap(self, ins: Instr, mods: list[str], args: list[str], act: Mask) -> None:
        lanes = self.lanes(act)
        if mods[0] == "cp_fenceproxy":
            source = self.addr(args[1])[lanes[:1]]
            at = self.shared_index(source, lanes[:1], 128)
            data = gather(self.smem, at, MAP_BYTES)
            target = self.addr(args[0])[lanes[:1]]
            self.global_write(target, lanes[:1], data)
            return
        if mods[0] != "replace":
            raise self.fault(f"opcode not known: {ins.text}")
        name = mods[2]
        offset, kind = FIELDS[name]
        ordinal, value = ("0", args[1]) if len(args) == 2 else (args[1], args[2])
        size = np.dtype(kind).itemsize
        offset += int(ordinal, 0) * size
        numbers_ = self.val(value, f"u{max(32, 8 * size)}")[lanes].astype(kind)
        data = numbers_.view(np.uint8).reshape(-1, size)
        address = self.addr(args[0])[lanes]
        if "global" in mods or (address >= GBASE).any():
            self.global_write(address + offset, lanes, data)
        else:
            local = np.where(address >= SBASE, address - SBASE, address)
            self.shared_write(self.shared_index(local + offset, lanes, size), lanes, data)
