"""What the user asks of a model's forwards: which adapters they run, and where those begin."""

from __future__ import annotations

from collections.abc import Sequence

from ..activation import Activation
from ..ambient import Ambient
from .adapters import Adapters
from .generation import Generation

BASE = "__base__"  # PEFT's word for a row of the base model
Names = str | list[str | None] | None


class Request:
    """Which adapters the forwards of one model run, and where they begin.

    Attributes:
        adapters: the adapters of the model that this request is for.
        chosen: whether `names` overrides the active adapters.
        names: one adapter for all rows; or a list with one adapter per row, None for the base
            model; or None: all rows run the base model.
        starts: absolute start of the adapter in each row (None = base); or None: search for it.
        offsets: PEFT's `alora_offsets`, counted from the end of the tokens of each forward.
        activation: the active rows, if the user gave them.
        generation: the running call of `generate`. Its starts hold for its own forwards alone.
        outer: the request around this one, perhaps for another model.
    """

    def __init__(
        self,
        adapters: Adapters,
        chosen: bool = False,
        names: Names = None,
        starts: Sequence[int | None] | None = None,
        offsets: Sequence[int | None] | None = None,
        activation: Activation | None = None,
        generation: Generation | None = None,
    ) -> None:
        self.adapters, self.chosen, self.names = adapters, chosen, names
        self.starts, self.offsets = starts, offsets
        self.activation, self.generation = activation, generation
        self.outer: Request | None = None


_current: Ambient[Request] = Ambient("alora_request")


def current_request(adapters: Adapters) -> Request | None:
    """The innermost request for the model of `adapters`."""
    request = _current.get()
    while request is not None and request.adapters is not adapters:
        request = request.outer
    return request


class requesting:
    """`with requesting(request):` sets the request. (A compiler traces a class more easily.)"""

    def __init__(self, request: Request | None) -> None:
        self.request = request
        self.before: Request | None = None

    def __enter__(self) -> None:
        self.before = _current.get()
        _current.set(self.request)
        if self.request is not None:
            self.request.outer = self.before

    def __exit__(self, *error: object) -> None:
        _current.set(self.before)


def rows_of(names: Names, batch: int) -> tuple[tuple[str, ...], list[str | None] | None]:
    """The adapters in `names`, and the adapter of each of `batch` rows (None if all are alike)."""
    if names is None:
        return (), None
    if isinstance(names, str):
        return (names,), None
    rows = [None if n is None or n == BASE else n for n in names]
    if batch % max(len(rows), 1) or not rows:
        raise ValueError(
            f"{len(rows)} adapter names were given for a batch of {batch} rows; give one for "
            "each row (generate repeats them for beams and return sequences)"
        )
    if len(set(rows)) == 1:
        return rows_of(rows[0], batch)
    rows = [n for n in rows for _ in range(batch // len(rows))]
    return tuple(dict.fromkeys(n for n in rows if n is not None)), rows
