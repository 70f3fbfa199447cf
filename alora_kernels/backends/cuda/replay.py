"""Replay: what a call does on the host, recorded once for each problem and then repeated.

Plans depend on sizes, layouts and options, and so do all fields of a launch but the addresses.
The second call of a problem is watched: which tensors it makes, which products the vendor's library
forms, and, for each launch, which fields are addresses, and of what. From then on a call makes
those tensors, puts the addresses into the parameter structs, and launches. A call that does
anything else (a torch operation of another kind, an address of unknown origin) is never replayed,
so replaying never changes a result.
"""

from __future__ import annotations

import functools
import operator
import re
import struct
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import launch as launching
from .layouts import LAYOUTS
from .plan import Plan

KEPT = 1024  # problems
MAPS_KEPT = 256  # of one operand of a launch: layers of one shape, and where x lay
MAP_BYTES = 128
EMPTY = ("empty", "new_empty", "empty_like")
ZEROS = ("zeros", "new_zeros", "zeros_like")
Function = Callable[[launching.Send], Sequence[Tensor | None]]


class Made(NamedTuple):
    """A tensor that the call makes: make(first input, *shape, **options)."""

    make: Callable[..., Tensor]
    shape: tuple[int, ...]
    options: dict[str, Any]


class Product(NamedTuple):
    """`function` of the vendor's library on the tensors `operands`."""

    function: Callable[..., Tensor]
    operands: tuple[int | None, ...]
    fresh: bool  # the result is a new tensor, not an operand that was changed in place


class Launch(NamedTuple):
    """One launch, whose parameters are pack(*pick(values)).

    `values` are the addresses of the tensors so far, and what each launch adds to them.
    """

    head: tuple[Any, ...]  # the arguments of the launch before the parameters
    constants: tuple[bytes, ...]  # what lies between the addresses
    shifts: tuple[tuple[int, int], ...]  # (value, offset): an address within a tensor
    maps: tuple[tuple[int, Callable[[int], bytes], dict[int, bytes]], ...]  # of the address (value)
    pick: Callable[[list[Any]], tuple[Any, ...]]
    pack: Callable[..., bytes]
    options: tuple[bool, ...]  # the arguments after the stream


class Tape(NamedTuple):
    """A recorded call. Its tensors: the inputs, what it makes, counters, products."""

    makes: tuple[Made, ...]
    counters: int  # arrival counters that the launches need; 0 if none
    steps: tuple[Product | Launch, ...]
    results: tuple[int | None, ...]
    launch: Callable[..., None]


def layouts(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """All that plans ask of tensors but the alignment of their addresses."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


class Replays:
    """The recorded calls of one backend."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, Tape | str] = {}

    def run(
        self, key: Hashable, inputs: list[Tensor | None], function: Function
    ) -> Sequence[Tensor | None]:
        """`function(send)`, replayed where it has been recorded.

        `inputs` are all tensors that `function` hands to a kernel and does not make itself; the
        first lies on the device. `key` decides everything that `function` does but the addresses.
        """
        addresses = [0 if t is None else t.data_ptr() for t in inputs]
        # Plans ask of an address only whether it is a multiple of 16.
        if functools.reduce(operator.or_, addresses) & 15:
            key = (key, *[at & 15 for at in addresses])
        found = self._seen.get(key)
        if found.__class__ is Tape:
            return play(found, inputs, addresses)  # type: ignore[arg-type]
        device = inputs[0].device  # type: ignore[union-attr]
        if found is None:
            if len(self._seen) >= KEPT:
                self._seen.clear()
            self._seen[key] = "once"
        elif found == "once" and not _capturing(device):
            recorder = Recorder(inputs, device)
            with recorder:
                results = function(recorder)
            self._seen[key] = recorder.tape(results) or "never"
            return results
        return function(launching.send_to_gpu)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def play(tape: Tape, tensors: list[Tensor | None], values: list[Any]) -> list[Tensor | None]:
    """Do what was recorded with other inputs `tensors`, at the addresses `values`."""
    makes, counters, steps, results, launch = tape
    first: Any = tensors[0]
    device = first.get_device()
    for make, shape, options in makes:
        made = make(first, *shape, **options)
        tensors.append(made)
        values.append(made.data_ptr())
    if counters:
        made = launching.arrival_counters(first.device, counters)
        tensors.append(made)
        values.append(made.data_ptr())
    stream = torch._C._cuda_getCurrentRawStream(device)
    for step in steps:
        if step.__class__ is Launch:
            head, constants, shifts, maps, pick, pack, flags = step  # type: ignore[misc]
            values += constants
            for value, offset in shifts:
                values.append(values[value] + offset)
            for value, encode, known in maps:
                address = values[value]
                values.append(known.get(address) or _encoded(address, encode, known))
            launch(*head, pack(*pick(values)), device, stream, *flags)
        else:
            function, operands, fresh = step  # type: ignore[misc]
            result = function(*[None if i is None else tensors[i] for i in operands])
            if fresh:
                tensors.append(result)
                values.append(result.data_ptr())
    return [None if i is None else tensors[i] for i in results]


def _encoded(address: int, encode: Callable[[int], bytes], known: dict[int, bytes]) -> bytes:
    if len(known) >= MAPS_KEPT:
        known.clear()
    found = known[address] = encode(address)
    return found


class Recorder(TorchDispatchMode):
    """A `send` that launches and writes down, and a mode that sees what torch does beside it."""

    def __init__(self, inputs: Sequence[Tensor | None], device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._inputs = inputs
        self._made: list[Tensor] = []
        self._makes: list[Made] = []
        self._counters: Tensor | None = None
        self._fresh: list[Tensor] = []
        self._steps: list[tuple[Any, ...]] = []
        self._foreign = False  # something happened that cannot be replayed
        self._vendor = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self._vendor or func.is_view or name == "detach":
            return result
        if name not in EMPTY and name not in ZEROS:
            self._foreign = True
            return result
        self._foreign |= result.device != self._device or not (
            result.is_contiguous() and result.dim()
        )
        same = result.dtype == self._inputs[0].dtype  # type: ignore[union-attr]
        make: Callable[..., Tensor] = Tensor.new_zeros if name in ZEROS else Tensor.new_empty
        options = {} if same else {"dtype": result.dtype}
        self._made.append(result)
        self._makes.append(Made(make, tuple(result.shape), options))
        return result

    def __call__(self, plan: Plan, fields: Sequence[Any]) -> None:
        """Launch, and remember."""
        for field in fields:
            if isinstance(field, Tensor) and launching.is_counters(field):
                self._foreign |= self._counters is not None and self._counters is not field
                self._counters = field
        self._steps.append((plan, tuple(fields)))
        launching.send_to_gpu(plan, fields)

    def vendor(self, function: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
        """A product by the vendor's library, of inputs and of earlier products."""
        self._vendor = True
        try:
            result = function(*operands)
        finally:
            self._vendor = False
        fresh = all(result is not t for t in operands)
        if fresh:
            self._fresh.append(result)
        self._steps.append((function, operands, fresh))
        return result

    def tape(self, results: Sequence[Tensor | None]) -> Tape | None:
        """The recorded call, or None when it is none that can be replayed."""
        from ... import _cuda

        if self._foreign:
            return None
        counters = [] if self._counters is None else [self._counters]
        self._tensors = [*self._inputs, *self._made, *counters]
        self._values: list[int] = list(range(len(self._tensors)))  # where play has their addresses
        self._count = len(self._values)
        steps: list[Product | Launch] = []
        fresh = iter(self._fresh)
        try:
            for step in self._steps:
                if isinstance(step[0], Plan):
                    steps.append(self._launch(*step))
                    continue
                function, operands, is_fresh = step
                steps.append(Product(function, tuple(map(self._index, operands)), is_fresh))
                if is_fresh:
                    self._tensors.append(next(fresh))
                    self._values.append(self._add())
            found = tuple(map(self._index, results))
        except LookupError:
            return None
        count = 0 if self._counters is None else self._counters.numel()
        return Tape(tuple(self._makes), count, tuple(steps), found, _cuda.launch)

    def _add(self) -> int:
        """The index of the next value."""
        self._count += 1
        return self._count - 1

    def _index(self, tensor: Tensor | None) -> int | None:
        """Which tensor this is: torch.empty hands out another object than the mode sees."""
        if tensor is None:
            return None
        found = [i for i, t in enumerate(self._tensors) if t is tensor or _same(t, tensor)]
        if len(found) != 1:
            raise LookupError("no tensor of the call, or one of two")
        return found[0]

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """The value that is the address of the memory `tensor` begins in, and how far in."""
        address = tensor.data_ptr()
        found = [
            (value, address - t.data_ptr())
            for value, t in zip(self._values, self._tensors)
            if t is not None and 0 <= address - t.data_ptr() < _extent(t)
        ]
        if len(found) != 1:
            raise LookupError("unknown memory, or memory of two tensors")
        return found[0]

    def _launch(self, plan: Plan, fields: Sequence[Any]) -> Launch:
        from ... import _cuda

        layout, count = LAYOUTS[plan.params], len(plan.maps)
        data = layout.pack(
            *[b""] * count,
            *[0 if v is None or isinstance(v, Tensor) else v for v in fields[count:]],
        )
        # Maps and addresses; between them all is constant.
        mapped = [i for i, spec in enumerate(plan.maps) if spec is not None]
        varied = mapped + [i for i, v in enumerate(fields) if i >= count and isinstance(v, Tensor)]
        sizes = [MAP_BYTES if i < count else 8 for i in varied]
        begins = [_starts(layout)[i] for i in varied]
        gaps = list(zip([0, *map(operator.add, begins, sizes)], [*begins, len(data)]))
        constants = [data[begin:end] for begin, end in gaps]
        kept = [c for c in constants if c]
        places = [self._add() if c else -1 for c in constants]
        shifts: list[tuple[int, int]] = []
        addresses = {}
        for i in varied:
            value, offset = self._place(fields[i])
            if offset:
                shifts.append((value, offset))
                value = self._add()
            addresses[i] = value
        maps: list[Any] = []
        for i, spec in enumerate(plan.maps):
            if spec is not None:
                told = (fields[i].dtype == torch.bfloat16, *spec.dims, spec.stride, *spec.box)
                maps.append((addresses[i], functools.partial(_encode, _cuda.tensor_map, told), {}))
                addresses[i] = self._add()
        order, form = [], "="
        for constant, place, field in zip(constants, places, [*varied, None]):
            if constant:
                order.append(place)
                form += f"{len(constant)}s"
            if field is not None:
                order.append(addresses[field])
                form += "Q" if field >= count else f"{MAP_BYTES}s"
        return Launch(
            launching.launch_head(plan), tuple(kept), tuple(shifts), tuple(maps),
            operator.itemgetter(*order), struct.Struct(form).pack, launching.launch_options(plan),
        )  # fmt: skip


@functools.cache
def _starts(layout: struct.Struct) -> list[int]:
    """Where each field of a struct without alignment begins."""
    starts, at = [], 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        repeats = 1 if kind in "sx" else int(count or 1)
        size = struct.calcsize(f"={count}{kind}") // repeats
        for _ in range(repeats):
            if kind != "x":
                starts.append(at)
            at += size
    return starts


def _encode(tensor_map: Callable[..., bytes], told: tuple[Any, ...], address: int) -> bytes:
    return tensor_map(address, *told)


def _same(root: Tensor | None, tensor: Tensor) -> bool:
    return (
        root is not None
        and root.dtype == tensor.dtype
        and root.shape == tensor.shape
        and root.stride() == tensor.stride()
        and root.data_ptr() == tensor.data_ptr()
        and root.numel() > 0
    )


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to behind the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum([(n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())])
    return (last + 1) * tensor.element_size()
