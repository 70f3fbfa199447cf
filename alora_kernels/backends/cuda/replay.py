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
import re
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import launch as launching
from .layouts import LAYOUTS
from .plan import Plan

NOTHING = 0  # the root whose address is zero
KEPT = 1024  # problems
MAPS_KEPT = 256  # of one operand of a launch: layers of one shape, and where x lay
EMPTY = ("empty", "new_empty", "empty_like")
ZEROS = ("zeros", "new_zeros", "zeros_like")
Function = Callable[[launching.Send], Sequence[Tensor | None]]


class Made(NamedTuple):
    """A tensor that the call makes."""

    make: Callable[..., Tensor] | None  # torch.empty, torch.zeros; None: new_empty of an input
    shape: tuple[int, ...]
    dtype: torch.dtype


class Product(NamedTuple):
    """`function` of the vendor's library on the roots `operands`."""

    function: Callable[..., Tensor]
    operands: tuple[int | None, ...]
    fresh: bool  # the result is a new root, not an operand that was changed in place


class Launch(NamedTuple):
    """One launch. `pack` joins constant bytes, tensor maps and addresses to the parameters."""

    head: tuple[Any, ...]  # the arguments of the launch before the parameters
    pack: Callable[..., bytes]
    maps: tuple[tuple[int, int, Callable[[int], bytes], dict[int, bytes]], ...]
    addresses: tuple[tuple[int, int], ...]  # (root, offset), after the maps
    rest: bytes  # the parameters after the last address
    options: tuple[bool, ...]  # the arguments after the stream


class Tape(NamedTuple):
    """A recorded call. Roots: nothing, the inputs, what it makes, counters, products."""

    makes: tuple[Made, ...]
    counters: int  # arrival counters that the launches need; 0 if none
    steps: tuple[Product | Launch, ...]
    results: tuple[int | None, ...]
    launch: Callable[..., None]


class Replays:
    """The recorded calls of one backend."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], Tape | str] = {}

    def run(
        self, key: tuple[Any, ...], laid_out: Sequence[Tensor | None],
        plain: Sequence[Tensor | None], function: Function,
    ) -> Sequence[Tensor | None]:  # fmt: skip
        """`function(send)`, replayed where it has been recorded.

        `laid_out` and `plain` are all tensors that `function` hands to a kernel and does not make
        itself; the first of all lies on the device. `key` and the layouts of `laid_out`, which are
        added here, decide everything that `function` does but the addresses.
        """
        inputs = [*laid_out, *plain]
        addresses = [0 if t is None else t.data_ptr() for t in inputs]
        device = laid_out[0].device  # type: ignore[union-attr]
        problem = (
            key, device.index,
            # Plans ask of an address only whether it is a multiple of 16.
            *[
                None if t is None else (t.shape, t.stride(), t.dtype, at & 15)
                for t, at in zip(laid_out, addresses)
            ],
        )  # fmt: skip
        found = self._seen.get(problem)
        if found.__class__ is Tape:
            return play(found, inputs, addresses, device)  # type: ignore[arg-type]
        if found is None:
            if len(self._seen) >= KEPT:
                self._seen.clear()
            self._seen[problem] = "once"
        elif found == "once" and not _capturing(device):
            recorder = Recorder(inputs, device)
            with recorder:
                results = function(recorder)
            self._seen[problem] = recorder.tape(results) or "never"
            return results
        return function(launching.send_to_gpu)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def play(
    tape: Tape, inputs: Sequence[Tensor | None], addresses: list[int], device: torch.device
) -> list[Tensor | None]:
    """Do what was recorded with other `inputs`; `addresses` are theirs."""
    makes, counters, steps, results, launch = tape
    roots, addresses = [None, *inputs], [0, *addresses]
    first: Any = inputs[0]
    index = device.index
    for make, shape, dtype in makes:
        made = first.new_empty(shape) if make is None else make(shape, dtype=dtype, device=device)
        roots.append(made)
        addresses.append(made.data_ptr())
    if counters:
        made = launching.arrival_counters(device, counters)
        roots.append(made)
        addresses.append(made.data_ptr())
    stream = torch._C._cuda_getCurrentRawStream(index)
    for step in steps:
        if step.__class__ is Launch:
            head, pack, maps, places, rest, options = step  # type: ignore[misc]
            values: list[Any] = [addresses[root] + offset for root, offset in places]
            if maps:
                values = [_map(addresses[m[0]] + m[1], m[2], m[3]) for m in maps] + values
            launch(*head, pack(*values) + rest, index, stream, *options)
        else:
            function, operands, fresh = step  # type: ignore[misc]
            result = function(*[None if i is None else roots[i] for i in operands])
            if fresh:
                roots.append(result)
                addresses.append(result.data_ptr())
    return [None if i is None else roots[i] for i in results]


def _map(address: int, encode: Callable[[int], bytes], known: dict[int, bytes]) -> bytes:
    found = known.get(address)
    if found is None:
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
        self._foreign |= not result.is_contiguous() or result.device != self._device
        same = result.dtype == self._inputs[0].dtype  # type: ignore[union-attr]
        make = torch.zeros if name in ZEROS else None if same else torch.empty
        self._made.append(result)
        self._makes.append(Made(make, tuple(result.shape), result.dtype))
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
        self._roots = [None, *self._inputs, *self._made, *counters, *self._fresh]
        try:
            steps = tuple([
                self._launch(*s) if isinstance(s[0], Plan)
                else Product(s[0], tuple([self._index(t) for t in s[1]]), s[2])
                for s in self._steps
            ])  # fmt: skip
            found = tuple([self._index(t) for t in results])
        except LookupError:
            return None
        count = 0 if self._counters is None else self._counters.numel()
        return Tape(tuple(self._makes), count, steps, found, _cuda.launch)

    def _index(self, tensor: Tensor | None) -> int | None:
        """The root that is `tensor`: torch.empty hands out another object than the mode sees."""
        if tensor is None:
            return None
        found = [i for i, root in enumerate(self._roots) if root is tensor or _same(root, tensor)]
        if len(found) != 1:
            raise LookupError("no root, or one of two")
        return found[0]

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """The one root whose memory `tensor` begins in, and how far in."""
        address = tensor.data_ptr()
        found = [
            (i, address - root.data_ptr())
            for i, root in enumerate(self._roots)
            if root is not None and 0 <= address - root.data_ptr() < _extent(root)
        ]
        if len(found) != 1:
            raise LookupError("unknown memory, or memory of two tensors")
        return found[0]

    def _launch(self, plan: Plan, fields: Sequence[Any]) -> Launch:
        from ... import _cuda

        maps: list[Any] = []
        for spec, tensor in zip(plan.maps, fields):
            if spec is not None:
                told = (tensor.dtype == torch.bfloat16, *spec.dims, spec.stride, *spec.box)
                encode = functools.partial(_encode, _cuda.tensor_map, told)
                maps.append((*self._place(tensor), encode, {}))
        places = {
            i: self._place(v)
            for i, v in enumerate(fields)
            if i >= len(plan.maps) and isinstance(v, Tensor)
        }
        pack, order, rest = _packing(plan, fields, places)
        return Launch(
            launching.launch_head(plan), pack, tuple(maps), order, rest,
            launching.launch_options(plan),
        )  # fmt: skip


def _packing(
    plan: Plan, fields: Sequence[Any], places: dict[int, tuple[int, int]]
) -> tuple[Callable[..., bytes], tuple[tuple[int, int], ...], bytes]:
    """How to pack the launch: pack(*maps, *addresses) + rest.

    Zeros between the addresses are pad bytes of the format, other constants are offsets from
    address zero.
    """
    layout = LAYOUTS[plan.params]
    count = len(plan.maps)
    values = [b""] * count + [
        0 if v is None or i in places else v for i, v in enumerate(fields) if i >= count
    ]
    data, starts = layout.pack(*values), _starts(layout)
    form = "=" + "".join(["128x" if spec is None else "128s" for spec in plan.maps])
    order: list[tuple[int, int]] = []
    at = 128 * count

    def constants(stop: int) -> str:
        nonlocal at
        text = ""
        while at < stop:
            size = 8 if stop - at >= 8 else 4
            number = int.from_bytes(data[at : at + size], sys.byteorder)
            if number:
                order.append((NOTHING, number))
            text += f"{size}x" if not number else "Q" if size == 8 else "I"
            at += size
        return text

    for i in sorted(places):
        form += constants(starts[i]) + "Q"
        order.append(places[i])
        at = starts[i] + 8
    return struct.Struct(form).pack, tuple(order), data[at:]


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
