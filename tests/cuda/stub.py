"""Stands for the extension: keeps what C++ would launch, with every address where C++ puts it."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import alora_kernels
from alora_kernels.backends.cuda.params import MAP, MAP_BYTES, STRUCTS, exported
from alora_kernels.backends.cuda.steps import Packed

STREAM = 5
COUNTERS = 0x7EED_0000_0000  # the address of counters, whoever asks


class Launched(NamedTuple):
    """One launch of one call."""

    packed: Packed
    data: bytes  # a tensor map is the numbers it is encoded from
    device: int
    stream: int

    @property
    def fields(self) -> dict[str, Any]:
        """The parameter struct by the names of its fields; a map as its numbers, or ()."""
        found: dict[str, Any] = {}
        for name, (kind, offset) in STRUCTS[self.packed.struct].fields.items():
            if kind is MAP:
                numbers = struct.unpack_from("=7Q", self.data, offset)
                found[name] = numbers if any(numbers) else ()
            else:
                letter = "Q" if kind.letter == "P" else kind.letter
                (found[name],) = struct.unpack_from(f"={letter}", self.data, offset)
        return found


def filled(packed: Packed, addresses: Sequence[int]) -> bytes:
    """The parameters with the addresses of one call, put there as `Packed` says."""
    data = bytearray(packed.data)
    for at, tensor, shift in packed.addresses:
        struct.pack_into("=Q", data, at, addresses[tensor] + shift)
    for at, _ in packed.counters:
        struct.pack_into("=Q", data, at, COUNTERS)
    for m in packed.maps:
        numbers = (m.is_bf16, m.columns, m.rows, m.stride, m.box_columns, m.box_rows)
        encoded = struct.pack("=7Q", addresses[m.tensor] + m.shift, *numbers)
        data[m.offset : m.offset + MAP_BYTES] = encoded.ljust(MAP_BYTES, b"\1")
    return bytes(data)


class Program:
    """As `_cuda.Program`."""

    def __init__(
        self, extension: Extension, launches: Sequence[Packed], residues: Sequence[int]
    ) -> None:
        self.extension, self.launches, self.residues = extension, launches, residues

    def __call__(self, addresses: list[int], device: int, stream: int) -> bool:
        pairs = zip(addresses, self.residues, strict=True)
        if any(residue >= 0 and address % 16 != residue for address, residue in pairs):
            return False
        for packed in self.launches:
            done = Launched(packed, filled(packed, addresses), device, stream)
            self.extension.launches.append(done)
        return True


class Extension:
    """As the module `_cuda`."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.made = 0  # programs
        self.__dict__.update(exported())

    def Program(self, launches: Sequence[Packed], residues: Sequence[int]) -> Program:
        self.made += 1
        return Program(self, launches, residues)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Extension:
    found = Extension()
    monkeypatch.setitem(sys.modules, "alora_kernels._cuda", found)  # type: ignore[arg-type]
    monkeypatch.setattr(alora_kernels, "_cuda", found, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    return found


def symbolic(launches: Sequence[Launched], tensors: dict[str, Tensor]) -> list[Any]:
    """The launches with names for addresses; memory that nobody names is numbered as it appears."""
    spans = {n: (t.data_ptr(), t.numel() * t.element_size()) for n, t in tensors.items()}
    unnamed: dict[int, str] = {}

    def name(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple([name(v) for v in value])
        if not isinstance(value, int) or value < 1 << 32:
            return value
        for n, (begin, size) in spans.items():
            if begin <= value < begin + size:
                return f"{n}+{value - begin}"
        return unnamed.setdefault(value, f"memory {len(unnamed)}")

    out = []
    for launched in launches:
        told = launched.packed
        head = told[: Packed._fields.index("struct")]
        shown = {n: name(value) for n, value in launched.fields.items()}
        out.append((head, shown, launched.device, launched.stream))
    return out
