"""The data types of a program: its steps, and views of tensors by name, without addresses.

A step makes a tensor, launches a kernel, or has PyTorch compute something (mostly a product by the
vendor's library). All of this is plain data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .params import MAP, STRUCTS
from .plan import Operand, Plan


class View(NamedTuple):
    """A tensor, or the part of it that begins `offset` bytes after its first element."""

    tensor: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    residue: int = 0  # the tensor's address modulo 16
    offset: int = 0

    @property
    def turned(self) -> View:
        """The transposed matrix."""
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])

    def rows_from(self, row: int) -> View:
        """The matrix from row `row` on."""
        shape = (self.shape[0] - row, *self.shape[1:])
        return self._replace(shape=shape, offset=self._behind(row, 0))

    def columns_from(self, column: int) -> View:
        """The matrix from column `column` on."""
        shape = (self.shape[0], self.shape[1] - column)
        return self._replace(shape=shape, offset=self._behind(column, 1))

    def _behind(self, count: int, dimension: int) -> int:
        return self.offset + count * self.strides[dimension] * self.dtype.itemsize

    @property
    def aligned(self) -> bool:
        """Whether the address is a multiple of 16."""
        return (self.residue + self.offset) % 16 == 0

    @property
    def operand(self) -> Operand:
        """The layout of a matrix, in the form that plans take."""
        stride0, stride1 = self.strides
        return Operand(stride0, stride1, self.aligned)


def view_of(name: str, tensor: Tensor | None) -> View | None:
    """A view with this name and the layout of `tensor`, without its contents and address."""
    if tensor is None:
        return None
    shape, strides = tuple(tensor.shape), tensor.stride()
    return View(name, shape, strides, tensor.dtype, tensor.data_ptr() % 16)


def fresh(name: str, shape: Sequence[int], dtype: torch.dtype) -> View:
    """A view of a contiguous tensor that the program makes. PyTorch aligns its address."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return View(name, tuple(shape), tuple(reversed(strides)), dtype)


class Counters(NamedTuple):
    """The address of `words` 32-bit counters. They are zero; the kernel sets them back to zero."""

    words: int


class Make(NamedTuple):
    """Make a new contiguous tensor on the device; filled with zeros if `zero`."""

    view: View
    zero: bool = False


class Launch(NamedTuple):
    """Launch a kernel. `fields` has a value for each field of its parameter struct."""

    plan: Plan
    fields: Mapping[str, View | Counters | float | None]

    @property
    def views(self) -> dict[str, View]:
        """The fields that are an address or a tensor map, each with its view."""
        return {n: v for n, v in self.fields.items() if isinstance(v, View)}


class Torch(NamedTuple):
    """Call `run.FUNCTIONS[function](*operands, *constants)`.

    The result is a new contiguous tensor. If `result` is None, the first operand changes in place.
    """

    function: str
    operands: tuple[View | None, ...]  # whole tensors
    result: View | None
    constants: tuple[Any, ...] = ()


Step = Make | Launch | Torch


class Program(NamedTuple):
    """One pass: steps, in order, on tensors with the names `inputs`."""

    inputs: tuple[str, ...]
    dtype: torch.dtype  # of the first input
    residues: tuple[int | None, ...]  # the inputs' addresses modulo 16; None: any
    steps: tuple[Step, ...]
    results: tuple[str | None, ...]

    @property
    def launches(self) -> list[Launch]:
        """The kernel launches, in order."""
        return [step for step in self.steps if isinstance(step, Launch)]


class Address(NamedTuple):
    """An address to write into the parameter bytes at `offset`."""

    offset: int
    tensor: int
    shift: int  # bytes from the tensor's address


class Zeros(NamedTuple):
    """The address of `words` counters, to write into the parameter bytes at `offset`."""

    offset: int
    words: int


class Mapped(NamedTuple):
    """A tensor map to write into the parameter bytes at `offset`."""

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
    """A launch in the form that C++ takes: parameter bytes, and the values each call fills in."""

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
    """`launch` with list positions in place of tensor names.

    `places` has, for each name, the position of the tensor that contains it, and its first byte in
    that tensor.

    Raises:
        TypeError: a field has no value, or a value has no field.
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
