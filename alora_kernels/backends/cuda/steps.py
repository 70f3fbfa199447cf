"""The steps of this backend's programs: `Launch`, beside those that all backends share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..programs import Make, Torch, View
from .params import MAP, STRUCTS
from .plan import Operand, Plan


def operand_of(view: View) -> Operand:
    """What plans ask of a matrix."""
    stride0, stride1 = view.strides
    return Operand(stride0, stride1, view.aligned)


class Counters(NamedTuple):
    """The address of so many 32-bit zeros, which the kernel sets back to zero."""

    words: int


class Launch(NamedTuple):
    """A kernel. `fields` has a value for each field of its parameter struct."""

    plan: Plan
    fields: Mapping[str, View | Counters | float | None]

    @property
    def views(self) -> dict[str, View]:
        """The fields that stand for an address or a mapped matrix, and of what."""
        return {n: v for n, v in self.fields.items() if isinstance(v, View)}


Step = Make | Launch | Torch


class Address(NamedTuple):
    """Where an address goes, and of what."""

    offset: int
    tensor: int
    shift: int  # bytes from the tensor's address


class Zeros(NamedTuple):
    """Where the address of counters goes, and how many there must be."""

    offset: int
    words: int


class Mapped(NamedTuple):
    """Where a tensor map goes, and of what."""

    offset: int
    tensor: int
    shift: int
    is_bf16: bool
    columns: int
    rows: int
    stride: int
    box_columns: int
    box_rows: int


class Packed(NamedTuple):
    """A launch as C++ takes it: parameter bytes, and what is put into them in each call."""

    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    dependent: bool
    cooperative: bool
    struct: str  # the name of the parameter struct
    data: bytes
    addresses: tuple[Address, ...]
    maps: tuple[Mapped, ...]
    counters: tuple[Zeros, ...]


def packed(launch: Launch, places: Mapping[str, tuple[int, int]]) -> Packed:
    """`launch` with numbers for the names of tensors.

    `places` has for each name the number of the tensor that holds it, and how many bytes into it.
    """
    plan, fields = launch
    struct = STRUCTS[plan.params]
    if fields.keys() != struct.fields.keys():
        odd = sorted(fields.keys() ^ struct.fields.keys())
        raise TypeError(f"{struct.name}: given without a field, or not given: {', '.join(odd)}")
    specs = dict(zip(struct.maps, plan.maps, strict=True))
    numbers, addresses, maps, counters = {}, [], [], []
    for name, (kind, offset) in struct.fields.items():
        value = fields[name]
        if isinstance(value, View):
            tensor, begin = places[value.tensor]
            where = Address(offset, tensor, begin + value.offset)
            spec = specs.get(name)
            if kind is not MAP:
                addresses.append(where)
            elif spec is not None:
                is_bf16 = value.dtype == torch.bfloat16
                maps.append(Mapped(*where, is_bf16, *spec.dims, spec.stride, *spec.box))
        elif isinstance(value, Counters):
            counters.append(Zeros(offset, value.words))
        elif value is not None:
            numbers[name] = value
    return Packed(
        plan.kernel, plan.grid, plan.block, plan.shared, plan.dependent, plan.cooperative,
        plan.params, struct.pack(numbers), tuple(addresses), tuple(maps), tuple(counters),
    )  # fmt: skip
