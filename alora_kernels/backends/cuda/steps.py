"""What a program is made of: views of tensors that have names but no addresses, and steps.

A step makes a tensor, launches a kernel, or lets PyTorch compute something (mostly a product by the
vendor's library). Names stand for tensors throughout. All of this is plain data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .params import MAP, STRUCTS
from .plan import Operand, Plan


class View(NamedTuple):
    """A tensor, or a part of one that begins `offset` bytes behind its first element."""

    tensor: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    residue: int = 0  # of the tensor's address, divided by 16
    offset: int = 0

    @property
    def turned(self) -> View:
        """The transposed matrix."""
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])

    def rows_from(self, row: int) -> View:
        """The matrix without its first rows."""
        shape = (self.shape[0] - row, *self.shape[1:])
        return self._replace(shape=shape, offset=self._behind(row, 0))

    def columns_from(self, column: int) -> View:
        """The matrix without its first columns."""
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
        """What plans ask of a matrix.

        Rows that overlap, as those of a broadcast one do (the gradient of a sum), have no tensor
        map: such a matrix counts as one that is not aligned.
        """
        (rows, columns), (stride0, stride1) = self.shape, self.strides
        overlap = (stride1 == 1 and stride0 < columns) or (stride0 == 1 and stride1 < rows)
        return Operand(stride0, stride1, self.aligned and not overlap)


def view_of(name: str, tensor: Tensor | None) -> View | None:
    """`tensor` by a name, without its contents and without its address."""
    if tensor is None:
        return None
    shape, strides = tuple(tensor.shape), tensor.stride()
    return View(name, shape, strides, tensor.dtype, tensor.data_ptr() % 16)


def fresh(name: str, shape: Sequence[int], dtype: torch.dtype) -> View:
    """A contiguous tensor that the program makes: PyTorch aligns its address."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return View(name, tuple(shape), tuple(reversed(strides)), dtype)


class Counters(NamedTuple):
    """The address of so many 32-bit zeros, which the kernel sets back to zero."""

    words: int


class Make(NamedTuple):
    """A new contiguous tensor of the device."""

    view: View
    zero: bool = False


class Launch(NamedTuple):
    """A kernel. `fields` has a value for each field of its parameter struct."""

    plan: Plan
    fields: Mapping[str, View | Counters | float | None]

    @property
    def views(self) -> dict[str, View]:
        """The fields that stand for an address or a mapped matrix, and of what."""
        return {n: v for n, v in self.fields.items() if isinstance(v, View)}


class Torch(NamedTuple):
    """`run.FUNCTIONS[function](*operands, *constants)`; without a `result` the first operand is
    changed in place, else the result is a new contiguous tensor."""

    function: str
    operands: tuple[View | None, ...]  # whole tensors
    result: View | None
    constants: tuple[Any, ...] = ()


Step = Make | Launch | Torch


class Program(NamedTuple):
    """One pass: what is done, in order, with tensors that are called `inputs`."""

    inputs: tuple[str, ...]
    dtype: torch.dtype  # of the first input
    residues: tuple[int | None, ...]  # of the inputs' addresses, divided by 16; None: any
    steps: tuple[Step, ...]
    results: tuple[str | None, ...]

    @property
    def launches(self) -> list[Launch]:
        """The kernels in order."""
        return [step for step in self.steps if isinstance(step, Launch)]


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
