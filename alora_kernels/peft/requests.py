"""What is asked of the forwards of a model: which adapters they run, and where these begin."""

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
        adapters: those of the model that this request is for.
        chosen: whether `names` overrides the active adapters.
        names: one adapter for all rows, one (or None for the base model) a row, or None: the base.
        starts: absolute start of the adapter in each row (None = base), or None: search.
        offsets: PEFT's `alora_offsets`, counted from the end of the tokens of each forward.
        activation: the active rows themselves.
        generation: the call of `generate` that runs, which tells starts to its own forwards alone.
        outer: the request around this one, perhaps of another model.
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
    """`with requesting(request):`; a class, because a compiler traces it more easily."""

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
    """The adapters that are named, and the one of each of `batch` rows where rows differ."""
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
        return rows_of(rows[0], batch)  # one for all rows, however it was said
    rows = [n for n in rows for _ in range(batch // len(rows))]
    return tuple(dict.fromkeys(n for n in rows if n is not None)), rows
