"""Tensor maps: their 128 bytes in memory, and the addresses of a box.

The format is this interpreter's own (hardware's is not documented); what makes a map, whether
`Machine.tensor_map`, a host program's encoder or `tensormap.replace`, writes these fields.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

MAP_BYTES = 128
ELEMENT = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}
CODE = {1: 0, 2: 1, 4: 2, 8: 4}
# Where this interpreter keeps the fields: (offset, numpy type); dims and the like are arrays.
FIELDS = {
    "global_address": (0, np.uint64),
    "rank": (8, np.uint8),
    "elemtype": (9, np.uint8),
    "swizzle_mode": (10, np.uint8),
    "interleave_layout": (11, np.uint8),
    "fill_mode": (12, np.uint8),
    "swizzle_atomicity": (13, np.uint8),
    "global_dim": (16, np.uint32),
    "box_dim": (36, np.uint32),
    "global_stride": (64, np.uint64),
    "element_stride": (96, np.uint32),
}


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """Innermost dimension first; strides in bytes, without the innermost."""

    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element: int
    swizzle: int

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def encode(self) -> np.ndarray:
        """The 128 bytes that stand for it in memory."""
        raw = np.zeros(MAP_BYTES, np.uint8)
        values: dict[str, Sequence[int]] = {
            "global_address": [self.address],
            "rank": [len(self.dims) - 1],
            "elemtype": [CODE[self.element]],
            "swizzle_mode": [self.swizzle],
            "global_dim": self.dims,
            "box_dim": self.box,
            "global_stride": self.strides,
        }
        for name, value in values.items():
            at, kind = FIELDS[name]
            data = np.array(value, kind).view(np.uint8)
            raw[at : at + len(data)] = data
        return raw


@functools.lru_cache(4096)
def decode(raw: bytes) -> TensorMap:
    """The inverse of `TensorMap.encode`."""
    blob = np.frombuffer(raw, np.uint8)

    def field(name: str, count: int) -> list[int]:
        at, kind = FIELDS[name]
        return blob[at : at + count * np.dtype(kind).itemsize].view(kind).astype(int).tolist()

    rank = field("rank", 1)[0] + 1
    return TensorMap(
        int(blob[:8].view(np.uint64)[0]), tuple(field("global_dim", rank)),
        tuple(field("global_stride", rank - 1)), tuple(field("box_dim", rank)),
        ELEMENT[field("elemtype", 1)[0]], field("swizzle_mode", 1)[0],
    )  # fmt: skip


@functools.lru_cache(256)
def _coordinates(box: tuple[int, ...], per: int) -> list[np.ndarray]:
    """Per dimension, the coordinate of each unit of `per` elements of the box, in memory order."""
    sizes = (box[0] // per, *box[1:])
    grids = np.meshgrid(*(np.arange(s) for s in sizes[::-1]), indexing="ij")[::-1]
    flat = [g.reshape(-1) for g in grids]
    flat[0] = flat[0] * per
    return flat


def tile(t: TensorMap, coord: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(offset in the box, global address, inside, unit) of each unit of bytes of a box."""
    whole = t.box[0] * t.element % 16 == 0 and 16 % t.element == 0
    if whole:
        edge = (t.dims[0] - coord[0]) * t.element
        whole = coord[0] >= 0 and (edge % 16 == 0 or edge >= t.box[0] * t.element)
    unit = 16 if whole else t.element
    grids = _coordinates(t.box, unit // t.element)
    inside = np.ones(len(grids[0]), np.bool_)
    address = np.full(len(grids[0]), t.address, np.int64)
    for d, g in enumerate(grids):
        at = g + coord[d]
        inside &= (at >= 0) & (at < t.dims[d])
        address += at * (t.element if d == 0 else t.strides[d - 1])
    return np.arange(len(address)) * unit, address, inside, unit


def swizzled(at: np.ndarray, mode: int) -> np.ndarray:
    """Shared-memory bytes `at` under swizzle mode 0..3 (none, 32, 64, 128 bytes)."""
    return at ^ (at >> 7 & (1 << mode) - 1) << 4 if mode else at
