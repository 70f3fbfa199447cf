"""Programs: what a backend does for one pass, as data, and the programs that a backend keeps.

A program is made of views of tensors that have names but no addresses, and of steps: a step makes
a tensor, lets PyTorch compute something (mostly a product by the vendor's library), or is a
backend's own launch of a kernel. Names stand for tensors throughout.

A program is a pure function of what is asked and of how tensors are laid out. So it is kept by
exactly that, and what changes from call to call (addresses, streams, contents) is no part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Call, Projection

PLAIN = ("row_adapter", "active_rows", "active_count", "seed")  # inputs that have one layout
KEPT = 2048  # entries, two for a program

Tensors = list[Tensor | None]  # the inputs, then what has been made so far
# A program as a function of its inputs; None, and nothing is changed, where an input's address is
# not aligned as the program expects.
Run = Callable[[Tensors], Tensors | None]


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
    def alignment(self) -> int:
        """The address, divided by 16: what is left."""
        return (self.residue + self.offset) % 16

    @property
    def aligned(self) -> bool:
        """Whether the address is a multiple of 16."""
        return self.alignment == 0


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


class Make(NamedTuple):
    """A new contiguous tensor of the device."""

    view: View
    zero: bool = False


class Torch(NamedTuple):
    """`FUNCTIONS[function](*operands, *constants)`; without a `result` the first operand is
    changed in place, else the result is a new contiguous tensor."""

    function: str
    operands: tuple[View | None, ...]  # whole tensors
    result: View | None
    constants: tuple[Any, ...] = ()


def bias_gradient(row_adapter: Tensor, dy: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling · Σ_active dy, summed in float32."""
    active = (row_adapter >= 0).unsqueeze(1)
    sums = torch.where(active, dy, 0).sum(0, dtype=torch.float32)
    return (sums * scaling).to(dtype)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    "mm": torch.mm,
    "addmm_": Tensor.addmm_,
    "contiguous": Tensor.contiguous,
    "bias_gradient": bias_gradient,
}


class Program(NamedTuple):
    """One pass: what is done, in order, with tensors that are called `inputs`."""

    inputs: tuple[str, ...]
    dtype: torch.dtype  # of the first input
    residues: tuple[int | None, ...]  # of the inputs' addresses, divided by 16; None: any
    steps: tuple[Any, ...]
    results: tuple[str | None, ...]

    @property
    def launches(self) -> list[Any]:
        """The backend's own steps in order."""
        return [step for step in self.steps if not isinstance(step, Make | Torch)]


class Adapted(NamedTuple):
    """A projection's layouts."""

    weight: View | None
    bias: View | None
    lora_a: View
    lora_b: View
    lora_bias: View | None


class Layouts(NamedTuple):
    """How the tensors of a pass lie in memory."""

    x: View
    projections: tuple[Adapted, ...]
    base_outs: tuple[View, ...] | None = None  # forward: what the adapter's part is added to
    xa: View | None = None  # backward: what forward saved
    dys: tuple[View, ...] = ()  # backward

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of the pass, in order; some may be absent."""
        count = len(self.projections)
        return input_names(count, self.base_outs is not None, bool(self.dys))

    @property
    def residues(self) -> tuple[int | None, ...]:
        """Of the inputs' addresses, divided by 16; None: any."""
        views: list[View | None] = [self.x, *(self.base_outs or ()), self.xa, *self.dys]
        for projection in self.projections:
            views += projection
        known = {view.tensor: view.residue for view in views if view is not None}
        return tuple([None if name in PLAIN else known.get(name, 0) for name in self.inputs])


def input_names(count: int, base_given: bool, backward: bool) -> tuple[str, ...]:
    """The inputs of a pass with `count` projections, in order; some may be absent."""
    names = ["x"]
    for i in range(count):
        names += [f"{name}{i}" for name in Adapted._fields]
    if base_given:
        names += [f"base_out{i}" for i in range(count)]
    if backward:
        names += ["xa", *[f"dy{i}" for i in range(count)]]
    return (*names, *PLAIN)


def layouts_of(
    x: Tensor, projections: Sequence[Projection], *, base_outs: Sequence[Tensor] | None = None,
    xa: Tensor | None = None, dys: Sequence[Tensor] = (),
) -> Layouts:  # fmt: skip
    """The layouts of a pass's tensors."""
    named: Any = view_of  # whose views are None where a tensor is: the types say where that may be

    def each(name: str, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return tuple([named(f"{name}{i}", t) for i, t in enumerate(tensors)])

    columns = [each(name, column) for name, column in zip(Adapted._fields, zip(*projections))]
    return Layouts(
        named("x", x),
        tuple([Adapted(*fields) for fields in zip(*columns)]),
        None if base_outs is None else each("base_out", base_outs),
        named("xa", xa),
        each("dy", dys),
    )


def signature_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """All that programs ask of tensors but the alignment of their addresses."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def flat_inputs(x: Tensor, projections: Sequence[Projection], *rest: Tensor | None) -> Tensors:
    """The inputs of a pass but the plain ones."""
    inputs: Tensors = [x]
    for p in projections:
        inputs += p
    inputs += rest
    return inputs


class KeptPrograms:
    """The programs of a backend, by keys that hold all that they are a function of."""

    def __init__(self) -> None:
        self._programs: dict[Hashable, Run] = {}

    def _again(self, key: Hashable, inputs: Tensors, call: Call) -> Tensors | None:
        """The results of the program that ran last for `key`; None where it must be planned."""
        run = self._programs.get(key)
        return None if run is None else run([*inputs, *plain_of(call)])

    def _anew(self, key: Hashable, inputs: Tensors, call: Call, make: Callable[[], Run]) -> Tensors:
        """Run the program that `make` plans, and keep it for `key`.

        A program is planned for addresses that are aligned in one way, and refuses others: the
        program for those then takes its place.
        """
        aligned = key, tuple([0 if t is None else t.data_ptr() % 16 for t in inputs])
        run = self._programs.get(aligned)
        if run is None:
            if len(self._programs) >= KEPT:
                self._programs.clear()
            run = make()
        self._programs[aligned] = self._programs[key] = run
        results = run([*inputs, *plain_of(call)])
        if results is None:
            raise RuntimeError(
                "alora_kernels: PyTorch gave memory whose address is not a multiple of 16"
            )
        return results


def plain_of(call: Call) -> tuple[Tensor | None, ...]:
    """The tensors of a call that have one layout."""
    activation = call.activation
    return (
        activation.row_adapter, activation.active_rows, activation.active_count, call.seed
    )  # fmt: skip
